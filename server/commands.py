"""Commands of the coordinator."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import (
    group,
    messages,
    new_table,
    print_json,
    print_message,
    print_result,
    print_table,
    results,
)
from polyclinic.configs.presets import load_run_config, read_run_config
from polyclinic.server.deployment.commands import coordinator
from polyclinic.server.runs.summary import summary_of

if TYPE_CHECKING:  # it brings torch
    from polyclinic.server.export.export import Exported

app = group()
runs = group("List runs, show one, or follow one.", invoke_without_command=True)
app.add_typer(runs, name="runs")
model = group("Inspect the network that settings describe.", no_args_is_help=True)
app.add_typer(model, name="model")
app.add_typer(coordinator, name="server")

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Preset: the name of a packaged one, such as demo, or a TOML file."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Change one setting; may be given repeatedly."
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its folder.")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder that contains run folders.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def settings(config: ConfigOption = None, changes: SetOption = None) -> None:
    """Print every setting of a run as one TOML file, for `flwr run -c`.

    Flower accepts either a file or key=value pairs; this combines both into one file.
    """
    from polyclinic.server.runs.folder import to_toml

    print_result(to_toml(load_run_config(config, changes or ())).rstrip("\n"))


SizeOption = Annotated[
    str | None,
    typer.Option("--size", help="Image size in pixels: 224, or height x width such as 256x320."),
]


@model.command()
def info(
    config: ConfigOption = None,
    changes: SetOption = None,
    size: SizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the network's parameters, operations and output shapes per part, for one image."""
    overrides = list(changes or ())
    if size is not None:
        height, width = read_size(size)
        overrides += [f"data.image-height={height}", f"data.image-width={width}"]
    settings = load_run_config(config, overrides)

    from polyclinic.mtl_model.backbone import BackboneError
    from polyclinic.mtl_model.summary import summarise
    from polyclinic.server.runs.tables import summary_table

    try:
        summary = summarise(settings.model, settings.data, settings.loss)
    except BackboneError as error:
        raise ConfigError(str(error)) from None
    if as_json:
        print_json(asdict(summary))
        return
    print_table(summary_table(summary, settings))


def read_size(text: str) -> tuple[int, int]:
    """Read height and width from ``224`` or ``256x320``.

    Raises:
        ConfigError: if it is neither.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--size: expected pixels as 224 or 256x320, got {text!r}")
    return int(sides[0]), int(sides[-1])


@runs.callback()
def list_runs(
    context: typer.Context, runs: RunsOption = Path("runs"), as_json: JsonOption = False
) -> None:
    """List the runs of a folder, oldest first."""
    if context.invoked_subcommand is not None:
        return
    if not runs.is_dir():
        raise ConfigError(f"{runs.absolute()}: expected a folder of runs; there is none")
    found = []
    for path in runs.glob("*/config.toml"):
        try:
            found.append(summary_of(path.parent))
        except ConfigError as error:  # one damaged folder does not hide the others
            print_message(f"warning: not listed: {error}")
    found.sort(key=lambda run: str(run.started))
    if as_json:
        print_json({"runs": [asdict(run) for run in found]})
        return
    table = new_table(
        ("run", "status", "strategy", "data", "best"), ("seed", "rounds", "best round")
    )
    for run in found:
        best = "-" if run.best_value is None else f"{run.select_by} {run.best_value:.3f}"
        number = "-" if run.best_round is None else str(run.best_round)
        table.add_row(
            *(run.run, run.status, run.strategy, run.data, best, str(run.seed)),
            *(str(run.rounds), number),
        )
    print_table(table)


@runs.command()
def show(run: RunArgument, runs: RunsOption = Path("runs"), as_json: JsonOption = False) -> None:
    """Print a run's tables: pooled values per round, and every site on the test images."""
    from polyclinic.server.runs.history import POOLED, read_history
    from polyclinic.server.runs.tables import central_text, class_tables, metrics_table, spent_text

    folder = folder_of(run, runs)
    lines = read_history(folder / "history.jsonl")
    summary = summary_of(folder)
    if as_json:
        text = (folder / "history.jsonl").read_text(encoding="utf-8") if lines else ""
        content = [json.loads(line) for line in text.splitlines()]
        print_json({**asdict(summary), "history": content})
        return
    config = read_run_config(folder / "config.toml")
    data = config.data
    pooled = {
        f"round {line.round}": line.metrics
        for line in lines
        if line.site == POOLED and line.split == "val" and line.metrics
    }
    print_table(metrics_table("Validation images of all sites, pooled", pooled, data.positive))
    for split, title in (("val", "validation"), ("test", "held-out test")):
        last = max((line.round for line in lines if line.split == split), default=None)
        rows = {
            line.site: line.metrics
            for line in lines
            if line.split == split and line.round == last and line.metrics
        }
        if rows:
            heading = f"Round {last} on the {title} images"
            print_table(metrics_table(heading, rows, data.positive))
            for table in class_tables(rows, data):
                print_table(table)
    spent = {
        line.site: line.train.epsilon for line in lines if line.train and line.train.epsilon
    }  # of each site's last round
    console = results()
    if spent:
        console.print(spent_text(spent, config.privacy.unit))
    for release in [line.central for line in lines if line.central][-1:]:
        console.print(central_text(release))
    print_result(f"{summary.status}: {summary.reason}" if summary.reason else summary.status)
    print_result(f"run folder: {folder.absolute()}")


@runs.command()
def watch(
    run: RunArgument,
    runs: RunsOption = Path("runs"),
    silence_s: Annotated[
        float | None,
        typer.Option(
            "--silence-s",
            min=1.0,
            help="Seconds without an event after which to give up; by default the run's deadlines.",
        ),
    ] = None,
) -> None:
    """Follow a run to its end. The last line says how it ended.

    Exit status: 0 completed; 1 failed, refused or silent for too long; 130 stopped watching.
    """
    folder = folder_of(run, runs)

    from polyclinic.server.runs.folder import RunFolder
    from polyclinic.server.runs.watch import watch_run

    raise typer.Exit(watch_run(RunFolder(folder.absolute()), silence_s))


@app.command()
def export(
    run: RunArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write: .onnx, .pt or .safetensors.")
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--format", help="onnx, torchscript or safetensors; by default, by the file's ending."
        ),
    ] = None,
    number: Annotated[
        int | None,
        typer.Option("--round", min=1, help="Number of a saved round; default: the best round."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Largest difference of a logit, relative to the largest logit.",
        ),
    ] = 1e-4,
    card: Annotated[
        Path | None,
        typer.Option("--card", help="Model card to write; by default FILE with .md appended."),
    ] = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Write a run's model to a file for other programs, and a model card next to it.

    The file's outputs are compared with the network's first. A file that differs is not kept, and
    the exit status is 1.
    """
    folder = folder_of(run, runs)
    card = card or out.with_name(f"{out.name}.md")
    for path in (out, card):
        if path.exists():
            raise ConfigError(f"{path} already exists and is not overwritten; give another name")

    # torch takes seconds to import, which a mistyped name does not have to wait for
    from polyclinic.configs.files import write_atomically
    from polyclinic.mtl_model.saved import format_of
    from polyclinic.server.export.export import ParityError, chosen_checkpoint, export_model
    from polyclinic.server.export.model_card import model_card
    from polyclinic.server.runs.folder import RunFolder

    found = RunFolder(folder.absolute())
    words = messages()
    chosen = format_of(out, kind)
    checkpoint = chosen_checkpoint(found, number)
    try:
        with words.status(f"writing and checking {chosen} (onnx: about a minute)"):
            exported = export_model(checkpoint, found.name, chosen, out, tolerance)
    except ParityError as error:
        print_message(f"error: {error}")
        raise typer.Exit(1) from None
    write_atomically(card, model_card(found, exported).encode())
    _print_exported(exported, card, as_json)


def _print_exported(exported: Exported, card: Path, as_json: bool) -> None:
    number = exported.metadata.round
    if as_json:
        print_json(
            {
                "file": str(exported.path),
                "card": str(card),
                "format": exported.format,
                "round": number,
                "sha256": exported.sha256,
                "weights_sha256": exported.metadata.weights_sha256,
                "parity": {
                    p.output: {"absolute": p.absolute, "relative": p.relative}
                    for p in exported.parity
                },
                "inputs": exported.inputs,
            }
        )
        return
    shapes = ", ".join("x".join(map(str, shape)) for shape in exported.inputs)
    print_result(f"difference from the network, for inputs of {shapes}:")
    for parity in exported.parity:
        print_result(f"  {parity}")
    print_result(f"{exported.path}: round {number}, {exported.bytes:,} bytes")
    print_result(f"{card}: model card, with sections for its owner to fill in")


def folder_of(run: str, runs: Path) -> Path:
    """Find a run's folder by its name or path.

    Raises:
        ConfigError: if there is no such run.
    """
    folder = runs / run if (runs / run).is_dir() else Path(run)
    if not (folder / "config.toml").is_file():
        raise ConfigError(
            f"{run}: no such run in {runs.absolute()}; `polyclinic runs` lists runs, and --runs "
            "names their folder"
        )
    return folder
