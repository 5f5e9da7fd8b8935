"""Metric values computed from the sums of one site or of all sites together.

A value that is undefined (for example, Dice without an image that shows a lesion) is None, never a
silent 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyclinic.mtl_model.sums import BINS, Classes, Floats, MetricSums


@dataclass(frozen=True)
class MaskClass:
    """Metrics of one mask class. Shares are in [0, 1]."""

    annotated: int  # number of images in which the class is annotated
    present: int  # number of annotated images that show the class; dice and iou average over them
    dice: float | None
    iou: float | None
    pooled_dice: float | None  # a single Dice over the pixels of all images
    false_positive_rate: float | None  # share of images without the class that have it predicted
    hd95: float | None  # 95th percentile Hausdorff distance in pixels, mean over hd95_images
    hd95_images: int  # images with both the class and a prediction of it; 0 if not measured


@dataclass(frozen=True)
class ImageClass:
    """Metrics of one image class against all others. Shares are in [0, 1]."""

    positives: int  # number of images of the class, the denominator of sensitivity
    negatives: int  # number of other labelled images, the denominator of specificity
    sensitivity: float | None
    specificity: float | None
    auc: float | None


@dataclass(frozen=True)
class Metrics:
    """Metrics of a set of images with the number of images behind them; None if undefined.

    Mask metrics are means over the mask classes for which they are defined. Sensitivity,
    specificity and AUC are those of the positive image class against all others. All shares are
    in [0, 1].
    """

    images: int
    lesions: int  # number of images that show any mask class
    labelled: int  # number of images with a label, the basis of the classification metrics
    dice: float | None
    iou: float | None
    pooled_dice: float | None
    false_positive_rate: float | None
    accuracy: float | None  # with multiple labels: share of images with all classes correct
    balanced_accuracy: float | None
    sensitivity: float | None
    specificity: float | None
    auc: float | None
    hd95: float | None = None  # pixels; None if distances were not measured
    mask_classes: dict[str, MaskClass] = field(default_factory=dict)  # by class name
    image_classes: dict[str, ImageClass] = field(default_factory=dict)  # by class name

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Metrics:
        """Read the output of ``dataclasses.asdict``; older files may lack per-class metrics."""
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
        """Format the main metrics on one line."""
        named = {"Dice": self.dice, "balanced accuracy": self.balanced_accuracy, "AUC": self.auc}
        values = (f"{n} {'-' if v is None else f'{v:.3f}'}" for n, v in named.items())
        return f"{', '.join(values)} (n {self.images})"

    def value(self, name: str) -> float | None:
        """Return the metric with the given configuration name.

        Args:
            name: a field in kebab-case, or ``score``: the mean of Dice and balanced accuracy, or
                the defined one if the other is None.
        """
        if name != "score":
            value: float | None = getattr(self, name.replace("-", "_"))
            return value
        return _mean((self.dice, self.balanced_accuracy))


def compute(sums: MetricSums, classes: Classes) -> Metrics:
    """Compute metrics from sums."""
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
    """Compute the metrics of an exclusive class, predicted where its logit is the largest."""
    confusion = sums.confusion
    right, positives = confusion[k, k], confusion[k].sum()
    negatives = confusion.sum() - positives
    false_positives = confusion[:, k].sum() - right
    return _image_class(sums, k, right, positives, negatives - false_positives, negatives)


def _one_of_several(sums: MetricSums, k: int) -> ImageClass:
    """Compute the metrics of an independent class, predicted where its logit is above 0.

    Logits above 0 are the upper half of the histogram.
    """
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
    """Compute the balanced accuracy.

    For exclusive classes it is the mean sensitivity of the classes that occur, of which there must
    be at least two. With multiple labels it is the mean over classes of
    (sensitivity + specificity) / 2 where both are defined.
    """
    if multi_label:
        return _mean(
            (c.sensitivity + c.specificity) / 2
            for c in images
            if c.sensitivity is not None and c.specificity is not None
        )
    present = [c.sensitivity for c in images if c.sensitivity is not None]
    return _mean(present) if len(present) > 1 else None


def area_under_curve(positives: Floats, negatives: Floats) -> float | None:
    """Compute the area under the ROC curve from two score histograms.

    It is the probability that a positive image scores above a negative one, with ties counted half;
    None if there are no positive or no negative images.

    Shapes:
        positives, negatives: (BINS,), number of images per score bin, low to high
    """
    below = np.cumsum(negatives) - negatives
    wins = (positives * (below + negatives / 2)).sum()
    return _ratio(wins, positives.sum() * negatives.sum())


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
