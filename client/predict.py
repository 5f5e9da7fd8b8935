"""A finished model on images: masks at the images' own size, and classes.

A mask is decided on the original's pixels: logits are cut out of the frame that the picture was
put into and interpolated back, so that a mask lies on its image whatever size the network sees.
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
from polyclinic.configs.passport import outputs
from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.measure import predicted_masks
from polyclinic.mtl_model.saved import SavedModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PREDICTIONS = "predictions.json"
_COLOURS = ((255, 64, 64), (64, 224, 64), (64, 160, 255), (255, 208, 0), (224, 64, 255))  # RGB


class NonFinitePredictionError(ValueError):
    """A model's answer to an image is no number."""


@dataclass(frozen=True)
class Finding:
    """What a model says of one image."""

    masks: NDArray[np.bool_]  # (M, height, width) of the original
    probabilities: dict[str, float]  # by image class
    classes: tuple[str, ...]  # those that are predicted: one, or with several labels any


@dataclass(frozen=True)
class Outcome:
    """What came of one image."""

    image: Path
    entry: dict[str, Any] | None  # for predictions.json
    reason: str = ""  # why there is no entry


def images_in(paths: Sequence[Path]) -> list[Path]:
    """Files as they are, and every image below a folder in order; none twice.

    Raises:
        ConfigError: if a folder holds no image.
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
    """A name for each image's results: its stem, numbered where an earlier image has it."""
    taken: set[str] = set()
    names = []
    for image in images:
        name, number = image.stem, 1
        while name.lower() in taken:  # some file systems take A and a for one name
            number += 1
            name = f"{image.stem}-{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def predict(
    model: SavedModel, images: Sequence[Path], out: Path, overlay: bool
) -> Iterator[Outcome]:
    """Predict image by image, writing masks as it goes; an image that cannot be read is told."""
    data = model.passport.data
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
    """Put one picture through a model.

    Raises:
        NonFinitePredictionError: if its answer holds NaN or infinity, which no threshold tells from
        a no.
    """
    data = model.passport.data
    pixels = torch.from_numpy(picture.pixels).unsqueeze(0)
    masks, classes = model.logits(normalised(pixels, data.normalise))
    if not (masks.isfinite().all() and classes.isfinite().all()):
        raise NonFinitePredictionError("expected finite logits of the model, got NaN or infinity")
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
    """Undo padding and resizing, bilinearly.

    Shapes:
        maps: (1, ., H, W)
        out:  (1, ., height, width) of the original
    """
    rows, columns = picture.frame.inside
    size = (picture.original.height, picture.original.width)
    return F.interpolate(maps[..., rows, columns], size=size, mode="bilinear", align_corners=False)


def _write_masks(out: Path, name: str, finding: Finding, data: DataConfig) -> dict[str, str]:
    """Write an image's masks.

    Returns:
        Files by mask class, relative to ``out``; one file of indices stands for all classes.
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
    """The class's own name, unless a file system could not have it."""
    return mask if mask.replace("-", "").replace("_", "").isalnum() else f"class-{number}"


def outlined(original: Image.Image, masks: NDArray[np.bool_]) -> Image.Image:
    """The image in colour, each mask class's outline on it in a colour of its own."""
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
    """Write predictions.json: the model, what it said of each image, and what could not be read."""
    outcomes = list(outcomes)
    passport = model.passport
    content = {
        "polyclinic-version": VERSION,
        "model": {
            "file": str(path),
            "sha256": model.sha256,
            "weights-sha256": model.weights_sha256,
            "run": passport.run,
            "round": passport.round,
        },
        "outputs": outputs(passport.data),
        "images": [o.entry for o in outcomes if o.entry is not None],
        "failed": [{"image": str(o.image), "reason": o.reason} for o in outcomes if o.reason],
    }
    (out / PREDICTIONS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return content
