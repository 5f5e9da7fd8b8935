"""Commands of the coordinator."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.presets import load_run_config, read_run_config
from polyclinic.server.deployment.commands import coordinator

if TYPE_CHECKING:  # it brings torch
    from polyclinic.server.export.export import Exported

app = typer.Typer()
runs = typer.Typer(help="List runs; print a run's tables again.", invoke_without_command=True)
app.add_typer(runs, name="runs")
model = typer.Typer(help="Look at the network that settings ask for.", no_args_is_help=True)
app.add_typer(model, name="model")
app.add_typer(coordinator, name="server")

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
    from polyclinic.server.runs.folder import to_toml

    sys.stdout.write(to_toml(load_run_config(config, changes or ())))


SizeOption = Annotated[
    str | None, typer.Option("--size", help="Pixels: 224, or height x width as 256x320.")
]


@model.command()
def info(
    config: ConfigOption = None,
    changes: SetOption = None,
    size: SizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a network's parameters, operations and output shapes, part by part, for one image."""
    overrides = list(changes or ())
    if size is not None:
        height, width = read_size(size)
        overrides += [f"data.image-height={height}", f"data.image-width={width}"]
    settings = load_run_config(config, overrides)

    from dataclasses import asdict

    from polyclinic.mtl_model.backbone import BackboneError
    from polyclinic.mtl_model.summary import summarise
    from polyclinic.server.runs.tables import summary_table

    try:
        summary = summarise(settings.model, settings.data, settings.loss)
    except BackboneError as error:
        raise ConfigError(str(error)) from None
    if as_json:
        sys.stdout.write(json.dumps(asdict(summary), indent=2) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)
    console.print(summary_table(summary, settings))


def read_size(text: str) -> tuple[int, int]:
    """Height and width from ``224`` or ``256x320``.

    Raises:
        ConfigError: if it is neither.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--size: expected pixels as 224 or 256x320, got {text!r}")
    return int(sides[0]), int(sides[-1])


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
    from polyclinic.server.runs.history import POOLED, read_history
    from polyclinic.server.runs.tables import central_text, class_tables, metrics_table, spent_text

    folder = _folder_of(name, out)
    lines = read_history(folder / "history.jsonl")
    if as_json:
        text = (folder / "history.jsonl").read_text(encoding="utf-8") if lines else ""
        content = [json.loads(line) for line in text.splitlines()]
        sys.stdout.write(json.dumps({**_summary(folder), "history": content}, indent=2) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)
    config = read_run_config(folder / "config.toml")
    data = config.data
    pooled = {
        f"round {line.round}": line.metrics
        for line in lines
        if line.site == POOLED and line.split == "val" and line.metrics
    }
    console.print(metrics_table("All sites' validation images pooled", pooled, data.positive))
    for split, title in (("val", "validation"), ("test", "held-out test")):
        last = max((line.round for line in lines if line.split == split), default=None)
        rows = {
            line.site: line.metrics
            for line in lines
            if line.split == split and line.round == last and line.metrics
        }
        if rows:
            heading = f"Round {last} on the {title} images"
            console.print(metrics_table(heading, rows, data.positive))
            for table in class_tables(rows, data):
                console.print(table)
    spent = {
        line.site: line.train.epsilon for line in lines if line.train and line.train.epsilon
    }  # the last round's of each site
    if spent:
        console.print(spent_text(spent, config.privacy.unit))
    for release in [line.central for line in lines if line.central][-1:]:
        console.print(central_text(release))
    summary = _summary(folder)
    console.print(f"{summary['status']}" + (f": {summary['reason']}" if summary["reason"] else ""))
    console.print(f"run folder: {folder.absolute()}", soft_wrap=True, highlight=False)


@runs.command()
def watch(
    name: Annotated[str, typer.Argument(help="A run's name, or its folder.")],
    out: OutOption = Path("runs"),
    silence_s: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Give up after so long without a word; by default, by the run's deadlines.",
        ),
    ] = None,
) -> None:
    """Follow a run to its end. The last line says how it ended.

    Exit status: 0 completed, 1 failed, refused, or no longer heard of, 130 stopped watching.
    """
    folder = _folder_of(name, out)

    from polyclinic.server.runs.folder import RunFolder
    from polyclinic.server.runs.watch import watch_run

    raise typer.Exit(watch_run(RunFolder(folder.absolute()), silence_s))


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's name, or its folder.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .onnx, .pt or .safetensors.")],
    kind: Annotated[
        str | None,
        typer.Option("--format", help="onnx, torchscript or safetensors; by default, by the file."),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", min=1, help="A kept round; by default the best.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="Largest difference of a logit, relative to the largest logit."),
    ] = 1e-4,
    card: Annotated[
        Path | None, typer.Option(help="Model card to write; by default FILE with .md behind it.")
    ] = None,
    runs_folder: Annotated[
        Path, typer.Option("--runs", help="Folder that holds run folders.")
    ] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Write a run's model as a file for other programs, and a model card beside it.

    The file is tried against the network first; one that differs is not kept (exit status 1).
    """
    folder = _folder_of(run, runs_folder)
    card = card or out.with_name(f"{out.name}.md")
    for path in (out, card):
        if path.exists():
            raise ConfigError(f"{path}: is there already; it is not written over")

    # torch takes seconds to import; a mistyped name need not wait for it
    from polyclinic.mtl_model.saved import format_of
    from polyclinic.server.export.export import ParityError, chosen_checkpoint, export_model
    from polyclinic.server.export.model_card import model_card
    from polyclinic.server.runs.folder import RunFolder, write_atomically

    found = RunFolder(folder.absolute())
    words = Console(stderr=True, markup=False, highlight=False)
    chosen = format_of(out, kind)
    checkpoint = chosen_checkpoint(found, number)
    try:
        with words.status(f"writing {chosen} and trying it (onnx: about a minute)"):
            exported = export_model(checkpoint, found.name, chosen, out, tolerance)
    except ParityError as error:
        words.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(1) from None
    write_atomically(card, model_card(found, exported).encode())
    _print_exported(exported, card, as_json)


def _print_exported(exported: Exported, card: Path, as_json: bool) -> None:
    number = exported.passport.round
    if as_json:
        content = {
            "file": str(exported.path),
            "card": str(card),
            "format": exported.format,
            "round": number,
            "sha256": exported.sha256,
            "weights-sha256": exported.passport.weights_sha256,
            "parity": {
                p.output: {"absolute": p.absolute, "relative": p.relative} for p in exported.parity
            },
            "inputs": exported.inputs,
        }
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    shapes = ", ".join("x".join(map(str, shape)) for shape in exported.inputs)
    sys.stdout.write(f"difference from the network over inputs of {shapes}:\n")
    for parity in exported.parity:
        sys.stdout.write(f"  {parity}\n")
    sys.stdout.write(f"{exported.path}: round {number}, {exported.bytes:,} bytes\n")
    sys.stdout.write(f"{card}: its model card, with parts for the owner to fill in\n")


def _folder_of(name: str, out: Path) -> Path:
    """A run's folder, by its name or path."""
    folder = out / name if (out / name).is_dir() else Path(name)
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{name}: no such run under {out.absolute()}")
    return folder


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
