"""Predict masks and classes of images with a trained model.

Masks have the original image's size: the logits are cropped to the image without padding and
interpolated back to the original size before they are thresholded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from polyclinic.client.data.dataset import normalised
from polyclinic.client.data.images import Picture, Unusable, read_picture
from polyclinic.configs import VERSION
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.model_metadata import outputs
from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.measure import predicted_masks
from polyclinic.mtl_model.saved import SavedModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PREDICTIONS = "predictions.json"
_COLOURS = ((255, 64, 64), (64, 224, 64), (64, 160, 255), (255, 208, 0), (224, 64, 255))  # RGB


class NonFinitePredictionError(ValueError):
    """A model's output for an image contains NaN or infinity."""


@dataclass(frozen=True)
class Finding:
    """A model's prediction for one image."""

    masks: NDArray[np.bool_]  # (M, height, width), at the original image's size
    probabilities: dict[str, float]  # probability per image class, 0 to 1
    classes: tuple[str, ...]  # predicted classes: exactly one, or any number if multi-label


@dataclass(frozen=True)
class Outcome:
    """The result for one image."""

    image: Path
    entry: dict[str, Any] | None  # entry for predictions.json; None if the image failed
    reason: str = ""  # why the image failed


def images_in(paths: Sequence[Path]) -> list[Path]:
    """List the given files and all images in the given folders, sorted, without duplicates.

    Raises:
        ConfigError: if a folder contains no images.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise ConfigError(f"{path}: expected images ({', '.join(SUFFIXES)}), found none")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def names_of(images: Sequence[Path]) -> list[str]:
    """Choose a unique name for each image's results: its stem, with a number if necessary."""
    used: set[str] = set()
    names = []
    for image in images:
        name, number = image.stem, 1
        while name.lower() in used:  # some file systems ignore case
            number += 1
            name = f"{image.stem}-{number}"
        used.add(name.lower())
        names.append(name)
    return names


def predict(
    model: SavedModel, images: Sequence[Path], out: Path, overlay: bool
) -> Iterator[Outcome]:
    """Predict image by image and write masks; yield an outcome with a reason for failed images.

    Args:
        model: the model.
        images: image files.
        out: folder for masks and overlays.
        overlay: also write each image with the outlines of its masks.
    """
    data = model.metadata.data
    for image, name in zip(images, names_of(images), strict=True):
        try:
            picture = read_picture(image, data)
        except Unusable as error:
            yield Outcome(image, None, str(error))
            continue
        try:
            finding = find(model, picture)
        except NonFinitePredictionError as error:
            yield Outcome(image, None, f"image {image}: {error}")
            continue
        files = _write_masks(out, name, finding, data)
        entry: dict[str, Any] = {
            "image": str(image),
            "width": picture.original.width,
            "height": picture.original.height,
            "classes": list(finding.classes),
            "probabilities": finding.probabilities,
            "area": {
                mask: float(plane.mean())
                for mask, plane in zip(data.mask_classes, finding.masks, strict=True)
            },
            "masks": files,
        }
        if overlay:
            path = out / "overlays" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            outlined(picture.original, finding.masks).save(path)
            entry["overlay"] = str(path.relative_to(out))
        yield Outcome(image, entry)


def find(model: SavedModel, picture: Picture) -> Finding:
    """Predict masks and classes of one image.

    Raises:
        NonFinitePredictionError: if the output contains NaN or infinity, which thresholds would
            silently turn into a negative prediction.
    """
    data = model.metadata.data
    pixels = torch.from_numpy(picture.pixels).unsqueeze(0)
    masks, classes = model.logits(normalised(pixels, data.normalise))
    if not (masks.isfinite().all() and classes.isfinite().all()):
        raise NonFinitePredictionError("expected finite logits from the model, got NaN or infinity")
    planes = predicted_masks(at_original_size(masks, picture), len(data.mask_classes))[0]
    logits = classes[0].double()
    several = data.label_kind == "multi-label"
    shares = (torch.sigmoid(logits) if several else torch.softmax(logits, dim=0)).tolist()
    predicted = (logits > 0).tolist() if several else _only(int(logits.argmax()), len(logits))
    return Finding(
        planes.numpy(),
        dict(zip(data.classes, shares, strict=True)),
        tuple(name for name, is_so in zip(data.classes, predicted, strict=True) if is_so),
    )


def _only(chosen: int, classes: int) -> list[bool]:
    return [k == chosen for k in range(classes)]


def at_original_size(maps: Tensor, picture: Picture) -> Tensor:
    """Undo padding and resizing with bilinear interpolation.

    Shapes:
        maps: (1, N, H, W)
        out:  (1, N, height, width), the original image's size
    """
    rows, columns = picture.frame.inside
    size = (picture.original.height, picture.original.width)
    return F.interpolate(maps[..., rows, columns], size=size, mode="bilinear", align_corners=False)


def _write_masks(out: Path, name: str, finding: Finding, data: DataConfig) -> dict[str, str]:
    """Write the masks of one image.

    Returns:
        Mask file per mask class, relative to ``out``; indexed masks share one file.
    """
    several = len(data.mask_classes) > 1
    planes = {
        mask: np.uint8(255) * plane
        for mask, plane in zip(data.mask_classes, finding.masks, strict=True)
    }
    folders = dict.fromkeys(planes, Path("masks"))
    if data.indexed_masks:
        order = np.arange(1, len(planes) + 1, dtype=np.uint8)
        index = (finding.masks * order[:, None, None]).max(axis=0)
        planes = dict.fromkeys(planes, index)
    elif several:
        folders = {
            mask: Path("masks") / _folder_name(mask, k)
            for k, mask in enumerate(data.mask_classes, start=1)
        }
    files: dict[str, str] = {}
    for mask, plane in planes.items():
        path = folders[mask] / f"{name}.png"
        if str(path) not in files.values():
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(plane).save(out / path)
        files[mask] = str(path)
    return files


def _folder_name(mask: str, number: int) -> str:
    """Use the class name as folder name, unless it has characters that are unsafe in paths."""
    return mask if mask.replace("-", "").replace("_", "").isalnum() else f"class-{number}"


def outlined(original: Image.Image, masks: NDArray[np.bool_]) -> Image.Image:
    """Draw the outlines of the masks on the image, with one colour per mask class."""
    import cv2

    canvas = np.array(original.convert("RGB"))
    thickness = max(1, round(min(canvas.shape[:2]) / 200))
    for k, plane in enumerate(masks):
        edges, _ = cv2.findContours(plane.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, edges, -1, _COLOURS[k % len(_COLOURS)], thickness)
    return Image.fromarray(canvas)


def write_predictions(
    out: Path, model: SavedModel, path: Path, outcomes: Iterable[Outcome]
) -> dict[str, Any]:
    """Write predictions.json: the model, the prediction for each image, and failed images."""
    outcomes = list(outcomes)
    metadata = model.metadata
    content = {
        "polyclinic_version": VERSION,
        "model": {
            "file": str(path),
            "sha256": model.sha256,
            "weights_sha256": model.weights_sha256,
            "run": metadata.run,
            "round": metadata.round,
        },
        "outputs": outputs(metadata.data),
        "images": [o.entry for o in outcomes if o.entry is not None],
        "failed": [{"image": str(o.image), "reason": o.reason} for o in outcomes if o.reason],
    }
    (out / PREDICTIONS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content
