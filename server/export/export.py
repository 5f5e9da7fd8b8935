"""Export a run's model to a file, and verify that the file gives the network's outputs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from polyclinic.configs import VERSION
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.files import write_atomically
from polyclinic.configs.model_metadata import ModelFileError, ModelMetadata
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.saved import Format, check_onnx, open_model, open_network
from polyclinic.server.export.formats import OUTPUTS, WRITERS
from polyclinic.server.runs.folder import RunFolder


class ParityError(RuntimeError):
    """The outputs of an exported file differ from the network's. The message gives the error."""


@dataclass(frozen=True)
class Parity:
    """Difference between an exported file and the network in one output, over all trial inputs."""

    output: str  # name of the output
    absolute: float  # largest absolute difference of two logits
    largest: float  # largest absolute logit of the network

    @property
    def relative(self) -> float:
        """Largest difference, relative to the largest logit, or to 1 if all are smaller."""
        return self.absolute / max(self.largest, 1.0)

    def __str__(self) -> str:
        return (
            f"{self.output}: at most {self.absolute:.1e}, {self.relative:.1e} of the largest logit "
            f"({self.largest:.3g})"
        )


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    path: Path
    format: Format
    metadata: ModelMetadata  # metadata in the file
    sha256: str  # digest of the file
    parity: tuple[Parity, ...]  # difference from the network, per output
    inputs: tuple[tuple[int, ...], ...]  # shapes (B, C, H, W) of the trial inputs
    parameters: int  # number of the network's parameters
    bytes: int  # size of the file


def chosen_checkpoint(folder: RunFolder, number: int | None) -> Path:
    """Find the checkpoint of a round, or of the best round.

    Args:
        folder: folder of the run.
        number: number of the round; None: the best round.

    Raises:
        ConfigError: if the run has no best round yet, or has not kept the round's checkpoint.
        ModelFileError: if the round's file has changed since it was saved.
    """
    kept = ", ".join(map(str, folder.checkpoints())) or "none"
    if number is None:
        if not folder.best.is_file():
            raise ConfigError(f"{folder.path}: has no best round; use --round (kept: {kept})")
        return folder.best
    if number not in folder.checkpoints():
        raise ConfigError(
            f"--round: expected a round with a kept checkpoint ({kept}; rounds.keep-checkpoints), "
            f"got {number}"
        )
    path = folder.checkpoint(number)
    saved = json.loads(folder.state(number).read_text(encoding="utf-8"))["sha256"]
    if _sha256(path) != saved:
        raise ModelFileError(f"{path}: expected sha256 {saved[:12]}, but the file has changed")
    return path


def export_model(checkpoint: Path, run: str, kind: Format, out: Path, tolerance: float) -> Exported:
    """Write a checkpoint's model in another format, after verifying its outputs.

    Args:
        checkpoint: file of the weights.
        run: name of the run, for the file's metadata.
        kind: format of the file.
        out: file to write. It is written only if the verification succeeds.
        tolerance: maximum difference of two logits, relative to the largest logit (or to 1).

    Raises:
        ModelFileError: if the checkpoint is incompatible with this version, or a package is
            missing.
        ParityError: if the file's logits differ by more than the tolerance.
    """
    if kind == "onnx":
        check_onnx("onnx", "onnxscript", "onnxruntime")
    metadata, network = open_network(checkpoint)
    metadata = replace(metadata, run=run, weights_sha256=_sha256(checkpoint), version=VERSION)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = WRITERS[kind](network, metadata)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent) as place:
        trial = Path(place) / out.name
        trial.write_bytes(content)
        inputs = trial_images(metadata)
        parity = compare(network, open_model(trial).logits, inputs)
        if not all(found.relative <= tolerance for found in parity):  # also true for nan
            raise ParityError(
                f"the outputs of the {kind} file differ from the network's, and it was not kept: "
                f"expected at most {tolerance:g} of the largest logit (--tolerance), got "
                f"{'; '.join(map(str, parity))}"
            )
    write_atomically(out, content)
    return Exported(
        out,
        kind,
        metadata,
        hashlib.sha256(content).hexdigest(),
        parity,
        tuple(tuple(images.shape) for images in inputs),
        sum(p.numel() for p in network.parameters()),
        len(content),
    )


def trial_images(metadata: ModelMetadata) -> list[Tensor]:
    """Return noise images to verify an exported file with.

    They have the size used in training, and other batch and image sizes that are not square and not
    multiples of a stride. One image is half black, as padded images are.
    """
    data = metadata.data
    h, w = data.image_height, data.image_width
    shapes = [(1, h, w), (3, h, w), (2, h // 2 + 5, w + 11), (1, h + 3, w // 2 + 2)]
    random = torch.Generator().manual_seed(0)
    noise = [torch.randn(b, data.channels, *size, generator=random) for b, *size in shapes]
    framed = noise[0].clone()
    framed[..., : h // 2, :] = -1.0
    return [*noise, framed]


@torch.inference_mode()
def compare(
    network: MultiTaskUNet,
    logits: Callable[[Tensor], tuple[Tensor, Tensor]],
    inputs: list[Tensor],
) -> tuple[Parity, ...]:
    """Measure the difference between an exported file's logits and the network's.

    Args:
        network: the network.
        logits: computes the file's mask and class logits.
        inputs: images, (B, C, H, W) each.
    """
    apart, largest = [0.0, 0.0], [0.0, 0.0]
    for images in inputs:
        prediction = network(images)
        expected = (prediction.mask_logits, prediction.class_logits)
        for k, (ours, theirs) in enumerate(zip(expected, logits(images), strict=True)):
            difference = float((ours - theirs).abs().max())
            # max() would ignore a nan
            apart[k] = difference if not difference <= apart[k] else apart[k]
            largest[k] = max(largest[k], float(ours.abs().max()))
    return tuple(map(Parity, OUTPUTS, apart, largest))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
