"""Sums to values: what a set of images, one site's or all sites' together, says of a model.

A value that is undefined (no image with a lesion, no second class) is None, never a silent 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyclinic.mtl_model.sums import BINS, Classes, Floats, MetricSums


@dataclass(frozen=True)
class MaskClass:
    """Values of one mask class."""

    annotated: int  # images in which it is annotated
    present: int  # of those, images that show it: Dice and IoU are averaged over them
    dice: float | None
    iou: float | None
    pooled_dice: float | None  # one Dice over all pixels
    false_positive_rate: float | None  # of images without it, those in which it was predicted
    hd95: float | None  # pixels, mean over the images of the next
    hd95_images: int  # images that show it and in which it was predicted, if distances were asked


@dataclass(frozen=True)
class ImageClass:
    """Values of one image class against the rest."""

    positives: int  # images of the class, which sensitivity is a share of
    negatives: int  # labelled images of other classes or none, which specificity is a share of
    sensitivity: float | None
    specificity: float | None
    auc: float | None


@dataclass(frozen=True)
class Metrics:
    """Values of a set of images, each with its support; None where undefined.

    Mask values are means over the mask classes for which they are defined. Sensitivity,
    specificity and AUC are of the positive image class against the rest.
    """

    images: int
    lesions: int  # images that show any mask class
    labelled: int  # images that the classification values are computed from
    dice: float | None
    iou: float | None
    pooled_dice: float | None
    false_positive_rate: float | None
    accuracy: float | None  # several labels: of images whose classes are all right
    balanced_accuracy: float | None
    sensitivity: float | None
    specificity: float | None
    auc: float | None
    hd95: float | None = None
    mask_classes: dict[str, MaskClass] = field(default_factory=dict)  # by name
    image_classes: dict[str, ImageClass] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Metrics:
        """Read what ``dataclasses.asdict`` wrote, also before there were values by class."""
        by_class = {
            "mask_classes": {
                name: MaskClass(**values)
                for name, values in content.get("mask_classes", {}).items()
            },
            "image_classes": {
                name: ImageClass(**values)
                for name, values in content.get("image_classes", {}).items()
            },
        }
        return cls(**{**content, **by_class})

    def brief(self) -> str:
        """The main values on one line."""
        named = {"Dice": self.dice, "balanced accuracy": self.balanced_accuracy, "AUC": self.auc}
        values = (f"{n} {'-' if v is None else f'{v:.3f}'}" for n, v in named.items())
        return f"{', '.join(values)} (n {self.images})"

    def value(self, name: str) -> float | None:
        """A value by its configured name: a field in kebab-case, or ``score``, the mean of Dice and
        balanced accuracy (of the one that is defined, if only one is)."""
        if name != "score":
            value: float | None = getattr(self, name.replace("-", "_"))
            return value
        return _mean((self.dice, self.balanced_accuracy))


def compute(sums: MetricSums, classes: Classes) -> Metrics:
    """Turn sums into values."""
    masks = {name: _mask_class(sums, k) for k, name in enumerate(classes.masks)}
    images = {
        name: _one_of_several(sums, k) if classes.multi_label else _one_of_all(sums, k)
        for k, name in enumerate(classes.images)
    }
    positive = images[classes.positive]
    return Metrics(
        images=int(sums.images[0]),
        lesions=int(sums.lesions[0]),
        labelled=int(sums.labelled[0]),
        dice=_mean(m.dice for m in masks.values()),
        iou=_mean(m.iou for m in masks.values()),
        pooled_dice=_mean(m.pooled_dice for m in masks.values()),
        false_positive_rate=_mean(m.false_positive_rate for m in masks.values()),
        accuracy=_ratio(sums.exact_matches[0], sums.labelled[0]),
        balanced_accuracy=_balanced(list(images.values()), classes.multi_label),
        sensitivity=positive.sensitivity,
        specificity=positive.specificity,
        auc=positive.auc,
        hd95=_mean(m.hd95 for m in masks.values()),
        mask_classes=masks,
        image_classes=images,
    )


def _mask_class(sums: MetricSums, k: int) -> MaskClass:
    return MaskClass(
        annotated=int(sums.annotated[k]),
        present=int(sums.present[k]),
        dice=_ratio(sums.dice[k], sums.present[k]),
        iou=_ratio(sums.iou[k], sums.present[k]),
        pooled_dice=_ratio(2 * sums.overlap[k], sums.predicted[k] + sums.actual[k]),
        false_positive_rate=_ratio(sums.false_positives[k], sums.annotated[k] - sums.present[k]),
        hd95=_ratio(sums.hd95[k], sums.hd95_images[k]),
        hd95_images=int(sums.hd95_images[k]),
    )


def _one_of_all(sums: MetricSums, k: int) -> ImageClass:
    """A class that excludes the others: predicted where its logit is the largest."""
    confusion = sums.confusion
    right, positives = confusion[k, k], confusion[k].sum()
    negatives = confusion.sum() - positives
    false_positives = confusion[:, k].sum() - right
    return _image_class(sums, k, right, positives, negatives - false_positives, negatives)


def _one_of_several(sums: MetricSums, k: int) -> ImageClass:
    """A class for itself: predicted where its logit is above 0, a histogram's upper half."""
    negatives, positives = sums.scores[k]  # (BINS,) each
    return _image_class(
        sums,
        k,
        positives[BINS // 2 :].sum(),
        positives.sum(),
        negatives[: BINS // 2].sum(),
        negatives.sum(),
    )


def _image_class(
    sums: MetricSums,
    k: int,
    found: float,
    positives: float,
    spared: float,
    negatives: float,
) -> ImageClass:
    return ImageClass(
        positives=int(positives),
        negatives=int(negatives),
        sensitivity=_ratio(found, positives),
        specificity=_ratio(spared, negatives),
        auc=area_under_curve(sums.scores[k, 1], sums.scores[k, 0]),
    )


def _balanced(images: list[ImageClass], multi_label: bool) -> float | None:
    """Mean sensitivity of the classes present, at least two; with several labels, the mean over
    classes of the mean of sensitivity and specificity, where both are defined."""
    if multi_label:
        return _mean(
            (c.sensitivity + c.specificity) / 2
            for c in images
            if c.sensitivity is not None and c.specificity is not None
        )
    present = [c.sensitivity for c in images if c.sensitivity is not None]
    return _mean(present) if len(present) > 1 else None


def area_under_curve(positives: Floats, negatives: Floats) -> float | None:
    """Chance that a positive scores above a negative, ties counted half.

    Args:
        positives, negatives: (BINS,) images by score, low to high.
    """
    below = np.cumsum(negatives) - negatives
    wins = (positives * (below + negatives / 2)).sum()
    return _ratio(wins, positives.sum() * negatives.sum())


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
