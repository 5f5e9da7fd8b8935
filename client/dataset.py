"""A site's images in memory: decoded and resized once, kept as bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from client.augment import Augmentation
from client.manifest import DataError, Manifest, Row
from client.split import split_rows
from configs.run import DataConfig
from mtl_model.losses import Targets
from mtl_model.tasks import Task

# A corrupt file shows as any of these, depending on where Pillow meets it.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Examples:
    """Images of one split with what is known of each; n examples, in the manifest's order."""

    images: NDArray[np.uint8]  # (n, H, W, C)
    masks: NDArray[np.uint8]  # (n, H, W), 0 or 1; 0 where there is none
    has_mask: NDArray[np.bool_]  # (n,)
    labels: NDArray[np.int64]  # (n,), -1 for none

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that at least one example is annotated for."""
        tasks: list[Task] = []
        if self.has_mask.any():
            tasks.append("segmentation")
        if (self.labels >= 0).any():
            tasks.append("classification")
        return tuple(tasks)

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        """(K,) examples of each class."""
        return np.bincount(self.labels[self.labels >= 0], minlength=classes)


@dataclass(frozen=True)
class SiteData:
    """All of a site's examples, by split, and what was left out."""

    site: str
    splits: dict[str, Examples]
    skipped: tuple[str, ...]  # one sentence for each row that could not be used
    fingerprint: str  # sha256 over pixels, masks and labels of every split


def load_site(manifest: Manifest, config: DataConfig) -> SiteData:
    """Read, check, split and resize a site's images.

    Raises:
        DataError: for an unknown label, too few images to split, or, if ``on_error`` is
            ``refuse``, the first row whose image or mask is missing, unreadable or of another
            size. Otherwise such rows are left out and reported in ``skipped``.
    """
    rows = [row for row in manifest.rows if row.label not in config.drop_labels]
    _check_labels(manifest, rows, config)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        read = list(pool.map(lambda row: _read_or_reason(manifest, row, config), rows))
    skipped = tuple(found for found in read if isinstance(found, str))
    if skipped and config.on_error == "refuse":
        raise DataError(f"{skipped[0]} ({len(skipped)} such rows; data.on-error is 'refuse')")
    pixels = {
        row.line: found for row, found in zip(rows, read, strict=True) if not isinstance(found, str)
    }
    if not pixels:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise DataError(f"site {manifest.site}: none of {len(rows)} images can be used{first}")
    usable = [row for row in rows if row.line in pixels]
    splits = {
        name: _examples([(row, *pixels[row.line]) for row in members], config)
        for name, members in split_rows(manifest, usable, config).items()
    }
    return SiteData(manifest.site, splits, skipped, _fingerprint(splits))


def _check_labels(manifest: Manifest, rows: Sequence[Row], config: DataConfig) -> None:
    for row in rows:
        if row.label is not None and row.label not in config.classes:
            raise DataError(
                f"{manifest.path}: row {row.line}: label: expected {', '.join(config.classes)} "
                f"(data.classes) or nothing, got {row.label!r}; rows of a label that the task "
                "does not need are left out with data.drop-labels"
            )


Pixels = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]


def _read_or_reason(manifest: Manifest, row: Row, config: DataConfig) -> Pixels | str:
    where = f"{manifest.path}: row {row.line}"
    image = _decoded(row.image, "RGB" if config.channels == 3 else "L")
    if isinstance(image, str):
        return f"{where}: image {row.image}: {image}"
    if row.mask is None:
        return _resized(image, None, config)
    mask = _decoded(row.mask, "mask")
    if isinstance(mask, str):
        return f"{where}: mask {row.mask}: {mask}"
    if mask.size != image.size:
        return (
            f"{where}: mask {row.mask}: expected the image's size, "
            f"{image.width} x {image.height}, got {mask.width} x {mask.height}"
        )
    return _resized(image, mask, config)


def _decoded(path: Path, kind: Literal["L", "RGB", "mask"]) -> Image.Image | str:
    """The whole picture, or what is wrong with it.

    16-bit greys keep their upper 8 bits. A mask is 255 wherever any channel is not 0 (alpha aside),
    whatever its depth: masks of 0/1 and of 0/255 both occur.
    """
    try:
        with Image.open(path) as file:
            file.load()
            if kind == "mask":
                return _marked(file.convert("RGB") if file.mode in ("P", "RGBA", "LA") else file)
            if file.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert(kind)
            if file.mode in ("I", "F"):
                return "32 bits a pixel: expected 8 or 16; window it first"
            return file.convert(kind)
    except FileNotFoundError:
        return "no such file"
    except _UNREADABLE as error:
        return f"cannot be decoded ({error})"


def _marked(mask: Image.Image) -> Image.Image:
    marked = np.asarray(mask) != 0
    return Image.fromarray(np.uint8(255) * (marked.any(axis=2) if marked.ndim == 3 else marked))


def _resized(image: Image.Image, mask: Image.Image | None, config: DataConfig) -> Pixels:
    height, width = config.image_height, config.image_width
    if config.resize == "pad":
        scale = min(height / image.height, width / image.width)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    else:
        size = (width, height)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    inside = (slice(top, top + size[1]), slice(left, left + size[0]))
    pixels = np.zeros((height, width, config.channels), np.uint8)
    small = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    pixels[inside] = small.reshape(size[1], size[0], config.channels)
    if mask is None:
        return pixels, None
    marked = np.zeros((height, width), np.uint8)
    marked[inside] = np.asarray(mask.resize(size, Image.Resampling.BILINEAR)) > 127
    return pixels, marked


def _examples(
    rows: Sequence[tuple[Row, NDArray[np.uint8], NDArray[np.uint8] | None]], config: DataConfig
) -> Examples:
    shape = (len(rows), config.image_height, config.image_width)
    images = np.zeros((*shape, config.channels), np.uint8)
    masks = np.zeros(shape, np.uint8)
    has_mask = np.zeros(len(rows), np.bool_)
    labels = np.full(len(rows), -1, np.int64)
    for i, (row, image, mask) in enumerate(rows):
        images[i] = image
        if mask is not None:
            masks[i] = mask
            has_mask[i] = True
        if row.label is not None:
            labels[i] = config.classes.index(row.label)
    return Examples(images, masks, has_mask, labels)


def _fingerprint(splits: dict[str, Examples]) -> str:
    digest = hashlib.sha256()
    for name, examples in splits.items():
        digest.update(name.encode())
        for array in (examples.images, examples.masks, examples.has_mask, examples.labels):
            digest.update(array.tobytes())
    return digest.hexdigest()


class ExampleDataset(Dataset[tuple[Tensor, Tensor, bool, int]]):
    """Examples one by one, augmented if asked; item i of a pass is the same on every machine."""

    def __init__(self, examples: Examples, augmentation: Augmentation | None = None) -> None:
        self.examples = examples
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, bool, int]:
        e = self.examples
        image, mask = e.images[index], e.masks[index]
        if self.augmentation is not None:
            image, mask = self.augmentation(image, mask, index)
        return (
            torch.from_numpy(image),
            torch.from_numpy(mask),
            bool(e.has_mask[index]),
            int(e.labels[index]),
        )


def to_batch(
    images: Tensor,
    masks: Tensor,
    has_mask: Tensor,
    labels: Tensor,
    normalise: str,
    device: torch.device,
) -> tuple[Tensor, Targets]:
    """Bytes to what the network takes.

    Shapes:
        images: (B, H, W, C) uint8; masks: (B, H, W) uint8; has_mask, labels: (B,)
        out:    (B, C, H, W) float32, and Targets with masks (B, 1, H, W)
    """
    x = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    if normalise == "image":
        deviation, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (deviation + 1.0)  # + 1 grey level: a blank image becomes 0, not noise
    else:
        x = (x / 255 - 0.5) / 0.25
    targets = Targets(
        masks.to(device, non_blocking=True).unsqueeze(1).float(),
        has_mask.to(device),
        labels.to(device),
    )
    return x, targets
