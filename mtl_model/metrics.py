"""Metrics of both tasks, cut in three: a batch to sums, sums to sums, sums to values.

A site turns its images into sums and sends only those; the server adds the sites' sums up and
turns each site's, and all sites' together, into values. A value that is undefined (no image with
a lesion, no second class) is None, never a silent 0 or 1.

Area under the curve comes from histograms of scores, which add up across sites as an exact rank
statistic would not. Scores are binned by their logit, 1/8 wide between -8 and 8; within a bin
they count as ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_model.losses import Targets
from mtl_model.network import Prediction

Floats = NDArray[np.float64]

BINS = 128
LARGEST_LOGIT = 8.0


@dataclass(frozen=True)
class MetricSums:
    """What a set of images adds up to. Every field is additive."""

    images: Floats  # (1,)
    masked: Floats  # (M,) images with a mask annotation
    with_class: Floats  # (M,) of those, images in which the mask class is present
    dice: Floats  # (M,) sum over images with the class
    iou: Floats  # (M,) sum over images with the class
    false_alarms: Floats  # (M,) images without the class in which a pixel was predicted
    overlap: Floats  # (M,) pixels, over all images with a mask annotation, like the next two
    predicted: Floats  # (M,)
    actual: Floats  # (M,)
    confusion: Floats  # (K, K) images by true class and predicted class
    scores: Floats  # (K, 2, BINS) images by class, whether they are of it, and score

    def __add__(self, other: MetricSums) -> MetricSums:
        return MetricSums(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(MetricSums))
        )

    def to_lists(self) -> dict[str, list[float]]:
        """Flat lists by field name, as a message carries them."""
        return {f.name: getattr(self, f.name).ravel().tolist() for f in fields(MetricSums)}

    @classmethod
    def from_lists(
        cls, lists: Mapping[str, Sequence[float]], mask_classes: int, image_classes: int
    ) -> MetricSums:
        """Read what ``to_lists`` wrote, at the other end of a wire.

        Raises:
            ValueError: naming the field that is missing, of another length, negative, not finite,
                or larger than the images allow.
        """
        zero = empty_sums(mask_classes, image_classes)
        arrays = {}
        for field in fields(cls):
            shape = getattr(zero, field.name).shape
            if field.name not in lists:
                raise ValueError(f"{field.name}: expected {shape}, got nothing")
            array = np.asarray(lists[field.name], dtype=np.float64)
            if array.size != np.prod(shape):
                raise ValueError(f"{field.name}: expected {shape}, got {array.size} numbers")
            if not np.isfinite(array).all() or (array < 0).any():
                raise ValueError(f"{field.name}: expected finite sums of 0 or more")
            arrays[field.name] = array.reshape(shape)
        sums = cls(**arrays)
        sums._check()
        return sums

    def _check(self) -> None:
        bounds = (
            ("masked", self.masked, self.images),
            ("with_class", self.with_class, self.masked),
            ("dice", self.dice, self.with_class),
            ("iou", self.iou, self.with_class),
            ("false_alarms", self.false_alarms, self.masked - self.with_class),
            ("overlap", self.overlap, np.minimum(self.predicted, self.actual)),
            ("confusion", self.confusion.sum(), self.images),
            ("scores", self.scores.sum(axis=(1, 2)), self.confusion.sum()),
        )
        for name, value, largest in bounds:
            if (value > largest + 1e-6).any():
                raise ValueError(f"{name}: expected at most {largest}, got {value}")


def empty_sums(mask_classes: int, image_classes: int) -> MetricSums:
    """The sums of no images at all."""
    shapes: dict[str, tuple[int, ...]] = {
        "images": (1,),
        "confusion": (image_classes, image_classes),
        "scores": (image_classes, 2, BINS),
    }
    per_mask = (mask_classes,)
    return MetricSums(
        **{f.name: np.zeros(shapes.get(f.name, per_mask)) for f in fields(MetricSums)}
    )


def batch_sums(prediction: Prediction, targets: Targets, image_classes: int) -> MetricSums:
    """Count one batch: masks at logit 0, classes by the largest logit.

    A task whose prediction is None counts nothing.
    """
    sums = empty_sums(targets.masks.shape[1], image_classes)
    sums.images[:] = len(targets.labels)
    if prediction.mask_logits is not None:
        _count_masks(sums, prediction.mask_logits > 0, targets)
    if prediction.class_logits is not None:
        _count_classes(sums, prediction.class_logits.float(), targets)
    return sums


def _count_masks(sums: MetricSums, predicted: Tensor, targets: Targets) -> None:
    actual = targets.masks > 0.5  # (B, M, H, W)
    keep = targets.has_mask[:, None]  # (B, 1)
    overlap = _numpy((predicted & actual).sum(dim=(2, 3)) * keep)  # (B, M)
    p = _numpy(predicted.sum(dim=(2, 3)) * keep)
    a = _numpy(actual.sum(dim=(2, 3)) * keep)
    has = a > 0
    union = p + a - overlap
    sums.masked[:] = int(targets.has_mask.sum())
    sums.with_class[:] = has.sum(0)
    sums.dice[:] = np.where(has, 2 * overlap / np.maximum(p + a, 1), 0).sum(0)
    sums.iou[:] = np.where(has, overlap / np.maximum(union, 1), 0).sum(0)
    sums.false_alarms[:] = (~has & (p > 0)).sum(0)
    sums.overlap[:] = overlap.sum(0)
    sums.predicted[:] = p.sum(0)
    sums.actual[:] = a.sum(0)


def _count_classes(sums: MetricSums, logits: Tensor, targets: Targets) -> None:
    known = targets.has_label
    true = _numpy(targets.labels[known]).astype(np.int64)
    guess = _numpy(logits[known].argmax(dim=1)).astype(np.int64)
    np.add.at(sums.confusion, (true, guess), 1)
    score = torch.log_softmax(logits[known], dim=1)
    rest = torch.log1p(-score.exp().clamp(max=1 - 1e-7))
    bins = ((score - rest + LARGEST_LOGIT) * (BINS / (2 * LARGEST_LOGIT))).floor()
    place = _numpy(bins.clamp(0, BINS - 1)).astype(np.int64)  # (B, K)
    for k in range(place.shape[1]):
        np.add.at(sums.scores[k], ((true == k).astype(np.int64), place[:, k]), 1)


def _numpy(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().numpy().astype(np.float64)


@dataclass(frozen=True)
class Metrics:
    """Values of a set of images, each with its support; None where undefined.

    Mask values are of the first mask class. Sensitivity, specificity and AUC are of the positive
    image class against the rest.
    """

    images: int
    lesions: int  # images that Dice and IoU are averaged over
    labelled: int  # images that the classification values are computed from
    dice: float | None
    iou: float | None
    pooled_dice: float | None  # one Dice over all pixels
    false_positive_rate: float | None  # of images without a lesion, those with one predicted
    accuracy: float | None
    balanced_accuracy: float | None  # mean sensitivity of the classes present, at least two
    sensitivity: float | None
    specificity: float | None
    auc: float | None

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
        defined = [v for v in (self.dice, self.balanced_accuracy) if v is not None]
        return sum(defined) / len(defined) if defined else None


def compute(sums: MetricSums, positive: int) -> Metrics:
    """Turn sums into values. ``positive`` is the index of the positive image class."""
    confusion = sums.confusion
    of_class = confusion.sum(axis=1)
    right = np.diag(confusion)
    labelled = confusion.sum()
    present = of_class > 0
    others = labelled - of_class[positive]
    false_alarms = confusion[:, positive].sum() - right[positive]
    recall = right[present] / of_class[present]
    return Metrics(
        images=int(sums.images[0]),
        lesions=int(sums.with_class[0]),
        labelled=int(labelled),
        dice=_ratio(sums.dice[0], sums.with_class[0]),
        iou=_ratio(sums.iou[0], sums.with_class[0]),
        pooled_dice=_ratio(2 * sums.overlap[0], sums.predicted[0] + sums.actual[0]),
        false_positive_rate=_ratio(sums.false_alarms[0], sums.masked[0] - sums.with_class[0]),
        accuracy=_ratio(right.sum(), labelled),
        balanced_accuracy=float(recall.mean()) if present.sum() > 1 else None,
        sensitivity=_ratio(right[positive], of_class[positive]),
        specificity=_ratio(others - false_alarms, others),
        auc=area_under_curve(sums.scores[positive, 1], sums.scores[positive, 0]),
    )


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
