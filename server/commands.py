"""Commands of the coordinator."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from configs.run import ConfigError, load_run_config

app = typer.Typer()
runs = typer.Typer(help="List runs; print a run's tables again.", invoke_without_command=True)
app.add_typer(runs, name="runs")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Preset: a TOML file such as configs/demo.toml."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting; may be given several times."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder that holds run folders.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command()
def settings(config: ConfigOption = None, changes: SetOption = None) -> None:
    """Print a run's settings, every key, as the one TOML file that `flwr run -c` takes.

    Flower takes either a file or key=value pairs; this makes one file of both.
    """
    from server.folder import to_toml

    sys.stdout.write(to_toml(load_run_config(config, changes or ())))


@runs.callback()
def list_runs(
    context: typer.Context, out: OutOption = Path("runs"), as_json: JsonOption = False
) -> None:
    """List the runs of a folder, oldest first."""
    if context.invoked_subcommand is not None:
        return
    if not out.is_dir():
        raise ConfigError(f"{out.absolute()}: expected a folder of runs, found none")
    rows = [_summary(path.parent) for path in out.glob("*/config.toml")]
    rows.sort(key=lambda row: str(row["started"]))
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    table = Table()
    for column in ("run", "started", "status", "rounds", "best round", "best value"):
        table.add_column(column)
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in list(row.values())[:6]))
    Console(markup=False, highlight=False).print(table)


@runs.command()
def show(
    name: Annotated[str, typer.Argument(help="A run's name, or its folder.")],
    out: OutOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Print a run's tables: every round's pooled values, and every site on the test images."""
    from server.history import POOLED, read_history
    from server.report import metrics_table

    folder = out / name if (out / name).is_dir() else Path(name)
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{name}: no such run under {out.absolute()}")
    lines = read_history(folder / "history.jsonl")
    if as_json:
        text = (folder / "history.jsonl").read_text(encoding="utf-8") if lines else ""
        content = [json.loads(line) for line in text.splitlines()]
        sys.stdout.write(json.dumps({**_summary(folder), "history": content}, indent=2) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)
    positive = load_run_config(folder / "config.toml").data.positive
    pooled = {
        f"round {line.round}": line.metrics
        for line in lines
        if line.site == POOLED and line.split == "val" and line.metrics
    }
    console.print(metrics_table("All sites' validation images pooled", pooled, positive))
    for split, title in (("val", "validation"), ("test", "held-out test")):
        last = max((line.round for line in lines if line.split == split), default=None)
        rows = {
            line.site: line.metrics
            for line in lines
            if line.split == split and line.round == last and line.metrics
        }
        if rows:
            heading = f"Round {last} on the {title} images"
            console.print(metrics_table(heading, rows, positive))
    summary = _summary(folder)
    console.print(f"{summary['status']}" + (f": {summary['reason']}" if summary["reason"] else ""))
    console.print(f"run folder: {folder.absolute()}", soft_wrap=True, highlight=False)


def _summary(folder: Path) -> dict[str, object]:
    outcome = _json(folder / "outcome.json")
    environment = _json(folder / "environment.json")
    states = sorted((folder / "checkpoints").glob("state-*.json"))
    value = outcome.get("best-value")
    return {
        "run": folder.name,
        "started": environment.get("started"),
        "status": outcome.get("status", "running or interrupted"),
        "rounds": _json(states[-1])["round"] if states else 0,
        "best-round": outcome.get("best-round"),
        "best-value": round(value, 3) if isinstance(value, float) else None,
        "reason": outcome.get("reason", ""),
    }


def _json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
