"""Metric sums of a site, which can be added to the sums of other sites.

A site computes sums over its images (measure.py) and sends only those; the server adds them up and
computes metrics from them (metrics.py).

The area under the ROC curve is computed from histograms of scores, which can be added across sites,
unlike exact rank statistics. Scores are binned by asinh(logit / 0.01), up to a logit of 1000: bins
are about 1e-4 wide around 0 and about 1/84 of the logit further out. This resolves the scores of a
network that has only begun to learn as well as those of a very confident one. Scores in the same
bin count as ties. The logits of a softmax are shifted so that equally likely classes have logit 0.
Logit 0 is a bin edge, so that with multiple labels the upper half of a histogram contains the
images that are predicted to belong to the class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from polyclinic.configs.schema.data import DataConfig

Floats = NDArray[np.float64]

BINS = 2048
SMALL_LOGIT = 1e-2  # logit at which bins change from equal widths to equal ratios
LARGEST_LOGIT = 1e3  # larger logits count in the last bin


@dataclass(frozen=True)
class Classes:
    """Names of the mask and image classes."""

    masks: tuple[str, ...]  # M
    images: tuple[str, ...]  # K
    positive: str  # the image class that sensitivity, specificity and AUC refer to
    multi_label: bool = False  # True if an image may belong to several image classes or to none

    @classmethod
    def of(cls, data: DataConfig) -> Classes:
        """Return the classes of a run's data settings."""
        several = data.label_kind == "multi-label"
        return cls(data.mask_classes, data.classes, data.positive, several)


@dataclass(frozen=True)
class MetricSums:
    """Sums over a set of images. Every field is additive and 0 or more."""

    images: Floats  # (1,) number of images
    lesions: Floats  # (1,) images in which any annotated mask class is present
    annotated: Floats  # (M,) images in which the mask class is annotated
    present: Floats  # (M,) annotated images in which the mask class is present
    dice: Floats  # (M,) sum of Dice over the images with the class
    iou: Floats  # (M,) sum of IoU over the images with the class
    false_positives: Floats  # (M,) annotated images without the class that have it predicted
    overlap: Floats  # (M,) pixels both predicted and true, over all annotated images
    predicted: Floats  # (M,) predicted pixels, over all annotated images
    actual: Floats  # (M,) true pixels, over all annotated images
    hd95: Floats  # (M,) sum of 95th percentile Hausdorff distances in pixels, over hd95_images
    hd95_images: Floats  # (M,) images with both the class and a prediction; 0 if not measured
    labelled: Floats  # (1,) images with a label
    exact_matches: Floats  # (1,) labelled images with all classes predicted correctly
    confusion: Floats  # (K, K) images by true and predicted class; 0 with multiple labels
    scores: Floats  # (K, 2, BINS) images by class, membership (0 no, 1 yes) and score bin

    def __add__(self, other: MetricSums) -> MetricSums:
        return MetricSums(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(MetricSums))
        )

    def to_lists(self) -> dict[str, list[float]]:
        """Convert to flat lists by field name, the form used in messages."""
        return {f.name: getattr(self, f.name).ravel().tolist() for f in fields(MetricSums)}

    @classmethod
    def from_lists(
        cls, lists: Mapping[str, Sequence[float]], classes: Classes, size: tuple[int, int]
    ) -> MetricSums:
        """Read and check the received output of ``to_lists``.

        Args:
            lists: flat lists by field name; unknown names are ignored.
            classes: names of the mask and image classes.
            size: height and width of the images in pixels, which bound pixels and distances.

        Raises:
            ValueError: if a field is missing, of a different length, negative, not finite, or
                larger than the number of images allows. The message names the field.
        """
        zero = empty_sums(classes)
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
        sums._check(size, classes.multi_label)
        return sums

    def _check(self, size: tuple[int, int], multi_label: bool) -> None:
        with_label = self.scores.sum(axis=(1, 2))
        bounds = (
            ("annotated", self.annotated, self.images),
            ("present", self.present, self.annotated),
            ("lesions", self.lesions, np.minimum(self.images, self.present.sum())),
            ("dice", self.dice, self.present),
            ("iou", self.iou, self.present),
            ("false_positives", self.false_positives, self.annotated - self.present),
            ("predicted", self.predicted, self.annotated * math.prod(size)),
            ("actual", self.actual, self.present * math.prod(size)),
            ("overlap", self.overlap, np.minimum(self.predicted, self.actual)),
            ("hd95_images", self.hd95_images, self.present),
            ("hd95", self.hd95, self.hd95_images * math.hypot(*size)),
            ("labelled", self.labelled, self.images),
            ("confusion", self.confusion.sum(), 0.0 if multi_label else self.labelled),
            (
                "exact_matches",
                self.exact_matches,
                self.labelled if multi_label else np.trace(self.confusion),
            ),
            ("scores", with_label, self.labelled),
        )
        for name, value, largest in bounds:
            if (value > largest + 1e-6 * (1 + largest)).any():
                raise ValueError(f"{name}: expected at most {largest}, got {value}")


def empty_sums(classes: Classes) -> MetricSums:
    """Return the sums of an empty set of images."""
    k = len(classes.images)
    per_mask = (len(classes.masks),)
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("images", "lesions", "labelled", "exact_matches"), (1,)),
        "confusion": (k, k),
        "scores": (k, 2, BINS),
    }
    return MetricSums(
        **{f.name: np.zeros(shapes.get(f.name, per_mask)) for f in fields(MetricSums)}
    )
