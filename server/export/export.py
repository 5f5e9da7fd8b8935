"""A run's model as a file for other programs, checked against the network before it is there."""

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
from polyclinic.configs.passport import ModelFileError, ModelMetadata
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.saved import Format, check_onnx, open_model, open_network
from polyclinic.server.export.formats import OUTPUTS, WRITERS
from polyclinic.server.runs.folder import RunFolder, write_atomically


class ParityError(RuntimeError):
    """An exported file does not say what the network says. The message says how far it is off."""


@dataclass(frozen=True)
class Parity:
    """How far one output of an exported file is from the network's, over all inputs tried."""

    output: str
    absolute: float  # largest difference of two logits
    largest: float  # logit of the network

    @property
    def relative(self) -> float:
        """To the largest logit, or to 1 where all are smaller."""
        return self.absolute / max(self.largest, 1.0)

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.absolute:.1e} at most, {self.relative:.1e} of the largest "
            f"logit ({self.largest:.3g})"
        )


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    format: Format
    passport: ModelMetadata
    sha256: str
    parity: tuple[Parity, ...]
    inputs: tuple[tuple[int, ...], ...]  # (B, C, H, W) of each that was tried
    parameters: int
    bytes: int


def chosen_checkpoint(folder: RunFolder, number: int | None) -> Path:
    """The file of a round's weights, or of the best round's.

    Raises:
        ConfigError: if the run has no best round yet, or did not keep that one.
        ModelFileError: if a round's file is not the one that was saved.
    """
    kept = ", ".join(map(str, folder.checkpoints())) or "none"
    if number is None:
        if not folder.best.is_file():
            raise ConfigError(f"{folder.path}: has no best round; give --round (kept: {kept})")
        return folder.best
    if number not in folder.checkpoints():
        raise ConfigError(
            f"--round: expected a round that was kept ({kept}; rounds.keep-checkpoints), "
            f"got {number}"
        )
    path = folder.checkpoint(number)
    saved = json.loads(folder.state(number).read_text(encoding="utf-8"))["sha256"]
    if _sha256(path) != saved:
        raise ModelFileError(f"{path}: expected the file of sha256 {saved[:12]}; it has changed")
    return path


def export_model(checkpoint: Path, run: str, kind: Format, out: Path, tolerance: float) -> Exported:
    """Write a checkpoint's model in a format; the file is there only once it was found right.

    Args:
        run: name of the run, for the file's passport.
        tolerance: largest difference of two logits, relative to the largest (or to 1).

    Raises:
        ModelFileError: if the checkpoint is not one of this version, or a package is missing.
        ParityError: if the file's logits differ by more than the tolerance.
    """
    if kind == "onnx":
        check_onnx("onnx", "onnxscript", "onnxruntime")
    passport, network = open_network(checkpoint)
    passport = replace(passport, run=run, weights_sha256=_sha256(checkpoint), version=VERSION)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = WRITERS[kind](network, passport)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent) as place:
        trial = Path(place) / out.name
        trial.write_bytes(content)
        inputs = trial_images(passport)
        parity = compare(network, open_model(trial).logits, inputs)
        if not all(found.relative <= tolerance for found in parity):  # not: nan is no parity either
            raise ParityError(
                f"the {kind} file does not say what the network says, and was not kept: "
                f"{'; '.join(map(str, parity))}; expected {tolerance:g} of the largest logit or "
                "less (--tolerance)"
            )
    write_atomically(out, content)
    return Exported(
        out,
        kind,
        passport,
        hashlib.sha256(content).hexdigest(),
        parity,
        tuple(tuple(images.shape) for images in inputs),
        sum(p.numel() for p in network.parameters()),
        len(content),
    )


def trial_images(passport: ModelMetadata) -> list[Tensor]:
    """Noise to try a file with: the trained size, and other batches and sizes, not square, and no
    multiple of anything; and one half black, as images are that were padded."""
    data = passport.data
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
    """Measure how far an opened file's logits are from the network's."""
    apart, largest = [0.0, 0.0], [0.0, 0.0]
    for images in inputs:
        prediction = network(images)
        expected = (prediction.mask_logits, prediction.class_logits)
        for k, (ours, theirs) in enumerate(zip(expected, logits(images), strict=True)):
            difference = float((ours - theirs).abs().max())
            # max() would pass over a nan
            apart[k] = difference if not difference <= apart[k] else apart[k]
            largest[k] = max(largest[k], float(ours.abs().max()))
    return tuple(map(Parity, OUTPUTS, apart, largest))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
