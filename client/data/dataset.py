"""Load a site's images into memory as uint8 arrays, decoded and resized once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from polyclinic.client.data.augment import Augmentation
from polyclinic.client.data.images import Pixels, Unusable, read_pixels
from polyclinic.client.data.manifest import MASK_OF, DataError, Manifest, Row
from polyclinic.client.data.splits import split_rows
from polyclinic.configs.schema.data import LABEL_SEPARATOR, NO_LABEL, DataConfig
from polyclinic.mtl_model.losses import Targets
from polyclinic.mtl_model.tasks import Task


@dataclass(frozen=True)
class Examples:
    """The n images of one split with their annotations, in the manifest's order."""

    images: NDArray[np.uint8]  # (n, H, W, C)
    masks: NDArray[np.uint8]  # (n, H, W, M), 0 or 1; 0 if not annotated
    has_mask: NDArray[np.bool_]  # (n, M), whether the mask class is annotated
    labels: NDArray[np.uint8]  # (n, K), 1 for each class of the image
    has_label: NDArray[np.bool_]  # (n,), whether the label is annotated
    group: NDArray[np.str_]  # (n,), the patient; the image path if the manifest has no group

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that at least one example is annotated for."""
        tasks: list[Task] = []
        if self.has_mask.any():
            tasks.append("segmentation")
        if self.has_label.any():
            tasks.append("classification")
        return tuple(tasks)

    @property
    def with_mask(self) -> int:
        """Number of examples with at least one annotated mask class."""
        return int(self.has_mask.any(axis=1).sum())

    @property
    def with_label(self) -> int:
        """Number of examples with a label."""
        return int(self.has_label.sum())

    def class_counts(self) -> NDArray[np.int64]:
        """Count the labelled examples of each class, (K,)."""
        return self.labels[self.has_label].sum(axis=0, dtype=np.int64)


@dataclass(frozen=True)
class SiteData:
    """All examples of a site by split, and the skipped rows."""

    site: str
    splits: dict[str, Examples]
    skipped: tuple[str, ...]  # one message per row that could not be used
    fingerprint: str  # SHA-256 over pixels, masks and labels of all splits


def load_site(manifest: Manifest, config: DataConfig, key: bytes | None = None) -> SiteData:
    """Read, check, split and resize a site's images.

    Args:
        manifest: the site's manifest.
        config: the run's data settings.
        key: secret split key of a private site; None: patients are split by a public hash.

    Raises:
        DataError: if a label is unknown, or if there are too few images to split. If ``on_error``
            is ``refuse``, also for the first row with a missing or unreadable file, a mask of
            another size than the image, or a mask value without a class. Otherwise such rows are
            skipped and listed in ``skipped``.
    """
    rows = [row for row in manifest.rows if not _dropped(row, config)]
    _check_labels(manifest, rows, config)
    _check_masks(manifest, rows, config)
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes
        read = list(pool.map(lambda row: read_or_reason(manifest, row, config), rows))
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
        name: _examples([(row, pixels[row.line]) for row in members], config)
        for name, members in split_rows(manifest, usable, config, key).items()
    }
    return SiteData(manifest.site, splits, skipped, _fingerprint(splits))


def _dropped(row: Row, config: DataConfig) -> bool:
    return not set(config.drop_labels).isdisjoint(row.labels(config.label_kind) or ())


def _check_labels(manifest: Manifest, rows: Sequence[Row], config: DataConfig) -> None:
    for row in rows:
        unknown = sorted((row.labels(config.label_kind) or frozenset()) - set(config.classes))
        if unknown:
            several = f", several joined by {LABEL_SEPARATOR!r}, {NO_LABEL}"
            raise DataError(
                f"{manifest.path}: row {row.line}: label: expected {', '.join(config.classes)} "
                f"(data.classes){several if config.label_kind == 'multi-label' else ''} or "
                f"nothing, got {unknown[0]!r}; to skip rows with a label, list it in "
                "data.drop-labels"
            )


def _check_masks(manifest: Manifest, rows: Sequence[Row], config: DataConfig) -> None:
    """Refuse mask columns that do not match the run's, since they would be ignored silently."""
    one_file = any(row.mask is not None for row in rows)
    of_class = sorted({name for row in rows for name, _ in row.masks_of})
    if config.mask_kind == "exclusive":
        if of_class and not one_file:
            raise DataError(
                f"{manifest.path}: expected masks in a column mask (data.mask-kind exclusive), got "
                f"only {', '.join(MASK_OF + name for name in of_class)}"
            )
    elif (of_class or one_file) and set(config.mask_classes).isdisjoint(of_class):
        raise DataError(
            f"{manifest.path}: expected masks in columns "
            f"{', '.join(MASK_OF + name for name in config.mask_classes)} (data.mask-classes), "
            f"got {', '.join([MASK_OF + name for name in of_class] or ['mask'])}"
        )


def read_or_reason(manifest: Manifest, row: Row, config: DataConfig) -> Pixels | str:
    """Read a row's pixels; return a message instead if the row cannot be used."""
    try:
        return read_pixels(row, config)
    except Unusable as reason:
        return f"{manifest.path}: row {row.line}: {reason}"


def _examples(rows: Sequence[tuple[Row, Pixels]], config: DataConfig) -> Examples:
    n, classes = len(rows), len(config.mask_classes)
    shape = (n, config.image_height, config.image_width)
    images = np.zeros((*shape, config.channels), np.uint8)
    masks = np.zeros((*shape, classes), np.uint8)
    has_mask = np.zeros((n, classes), np.bool_)
    labels = np.zeros((n, len(config.classes)), np.uint8)
    has_label = np.zeros(n, np.bool_)
    for i, (row, pixels) in enumerate(rows):
        images[i], masks[i], has_mask[i] = pixels.image, pixels.masks, pixels.has_mask
        names = row.labels(config.label_kind)
        if names is not None:
            labels[i] = [name in names for name in config.classes]
            has_label[i] = True
    group = np.array([row.group for row, _ in rows], dtype=np.str_)
    return Examples(images, masks, has_mask, labels, has_label, group)


def _fingerprint(splits: dict[str, Examples]) -> str:
    digest = hashlib.sha256()
    for name, examples in splits.items():
        digest.update(name.encode())
        for key, array in vars(examples).items():
            if key != "group":
                digest.update(array.tobytes())
    return digest.hexdigest()


class Example(NamedTuple):
    """One item of a data set, or a batch of items with an additional first dimension B."""

    image: Tensor  # (H, W, C), uint8
    masks: Tensor  # (H, W, M), uint8
    has_mask: Tensor  # (M,), bool
    labels: Tensor  # (K,), uint8
    has_label: Tensor  # (), bool


class ExampleDataset(Dataset[Example]):
    """A PyTorch data set of examples, optionally augmented.

    Item i of a pass is the same on every machine.
    """

    def __init__(self, examples: Examples, augmentation: Augmentation | None = None) -> None:
        self.examples = examples
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        e = self.examples
        image, masks = e.images[index], e.masks[index]
        if self.augmentation is not None:
            image, masks = self.augmentation(image, masks, index)
        return Example(
            torch.from_numpy(image),
            torch.from_numpy(masks),
            torch.from_numpy(e.has_mask[index]),
            torch.from_numpy(e.labels[index]),
            torch.tensor(e.has_label[index]),
        )


def to_batch(batch: Example, normalise: str, device: torch.device) -> tuple[Tensor, Targets]:
    """Convert a batch of uint8 examples to the network's input and targets.

    Shapes:
        out: (B, C, H, W) float32, and Targets with masks (B, M, H, W)
    """
    x = normalised(batch.image.to(device, non_blocking=True), normalise)
    masks = batch.masks.to(device, non_blocking=True).permute(0, 3, 1, 2)
    targets = Targets(
        masks.float(),
        batch.has_mask.to(device),
        batch.labels.to(device).float(),
        batch.has_label.to(device),
    )
    return x, targets


def normalised(images: Tensor, normalise: str) -> Tensor:
    """Convert uint8 images to the network's input.

    Args:
        images: the images.
        normalise: ``image`` for zero mean and unit deviation per image; ``fixed`` maps 0 to 255
            linearly to -2 to 2.

    Shapes:
        images: (B, H, W, C), uint8
        out:    (B, C, H, W), float32
    """
    x = images.permute(0, 3, 1, 2).float()
    if normalise == "image":
        deviation, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
        return (x - mean) / (deviation + 1.0)  # + 1 grey level maps a blank image to 0, not noise
    return (x / 255 - 0.5) / 0.25
