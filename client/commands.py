"""Commands of whoever has images and a finished model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from configs.run import ConfigError

app = typer.Typer()


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(help="A .safetensors, .onnx or .pt file, or a run by its folder or name."),
    ],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write masks and classes into.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also draw outlines on each image.")
    ] = False,
    runs: Annotated[Path, typer.Option("--runs", help="Folder that holds run folders.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print predictions.json.")] = False,
) -> None:
    """Outline and classify images with a finished model, on the CPU.

    Masks are as large as their images. Only open ONNX and TorchScript files that you trust: graphs
    and programs are run as they stand. Exit status: 1 if any image could not be used; the others
    are done.
    """
    path = _model_file(model, runs)
    if (out / "predictions.json").exists():
        raise ConfigError(f"--out: {out} holds predictions already; they are not written over")

    # torch takes seconds to import; a mistyped path need not wait for it
    from rich.console import Console
    from rich.progress import track

    from client.predict import images_in, write_predictions
    from client.predict import predict as predict_each
    from mtl_model.saved import open_model

    found = images_in(images)
    opened = open_model(path)
    out.mkdir(parents=True, exist_ok=True)
    words = Console(stderr=True, markup=False, highlight=False)
    steps = track(
        predict_each(opened, found, out, overlay),
        "predicting",
        total=len(found),
        console=words,
        disable=not words.is_terminal,
    )
    outcomes = list(steps)
    content = write_predictions(out, opened, path, outcomes)
    if as_json:
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    for outcome in outcomes:
        if outcome.entry is None:
            words.print(f"error: {outcome.reason}", soft_wrap=True)
        elif not as_json:
            sys.stdout.write(f"{outcome.image}: {_brief(outcome.entry)}\n")
    failed = len(content["failed"])
    words.print(f"{len(found) - failed} images done: {out.absolute()}", soft_wrap=True)
    if failed:
        words.print(f"error: {failed} of {len(found)} images could not be used")
        raise typer.Exit(1)


def _model_file(model: str, runs: Path) -> Path:
    """A file as it is; of a run, the best round's weights.

    Raises:
        ConfigError: if there is neither.
    """
    if Path(model).is_file():
        return Path(model)
    for folder in (Path(model), runs / model):
        if (folder / "config.toml").is_file():
            best = folder / "best.safetensors"
            if not best.is_file():
                raise ConfigError(f"{folder}: has no best round's weights ({best.name})")
            return best
    raise ConfigError(
        f"{model}: expected a model's file or a run, found neither here nor in {runs}"
    )


def _brief(entry: dict[str, Any]) -> str:
    """An image's classes with their probabilities, and what share of it each mask covers."""
    classes = ", ".join(f"{name} {p:.3f}" for name, p in entry["probabilities"].items())
    masks = ", ".join(f"{name} {share:.1%}" for name, share in entry["area"].items())
    return f"{classes}; {masks} of the image"
