"""What a site tells of its images: sums, which can be added to other sites'.

A site turns its images into sums (measure.py) and sends only those; the server adds them up and
turns them into values (metrics.py).

Area under the curve comes from histograms of scores, which add up across sites as an exact rank
statistic would not. Scores are binned by asinh(logit / 0.01): 1e-4 of a logit wide around 0, an
84th of the logit further out, up to 1000, so that a network's are told apart that has only begun to
learn, and one's that is very sure; within a bin they count as ties. A softmax's logits are counted
from where all classes are as likely. One edge is at logit 0, so that, where labels are several, a
histogram's upper half is what is predicted to be of the class.
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
SMALL_LOGIT = 1e-2  # about which bins change from equal widths to equal ratios
LARGEST_LOGIT = 1e3


@dataclass(frozen=True)
class Classes:
    """What is told apart, by name."""

    masks: tuple[str, ...]  # M
    images: tuple[str, ...]  # K
    positive: str  # the image class that single values refer to
    multi_label: bool = False  # an image may be of several image classes, or of none

    @classmethod
    def of(cls, data: DataConfig) -> Classes:
        several = data.label_kind == "multi-label"
        return cls(data.mask_classes, data.classes, data.positive, several)


@dataclass(frozen=True)
class MetricSums:
    """What a set of images adds up to. Every field is additive."""

    images: Floats  # (1,)
    lesions: Floats  # (1,) images in which any annotated mask class is present
    annotated: Floats  # (M,) images in which the mask class is annotated
    present: Floats  # (M,) of those, images in which it is present
    dice: Floats  # (M,) sum over images with the class
    iou: Floats  # (M,) sum over images with the class
    false_positives: Floats  # (M,) images without the class in which a pixel was predicted
    overlap: Floats  # (M,) pixels, over all images with a mask annotation, like the next two
    predicted: Floats  # (M,)
    actual: Floats  # (M,)
    hd95: Floats  # (M,) sum of pixels, over the images of the next
    hd95_images: Floats  # (M,) images with the class in which a pixel was predicted, if asked for
    labelled: Floats  # (1,) images with a label
    exact_matches: Floats  # (1,) of those, images whose classes are all predicted, and no others
    confusion: Floats  # (K, K) images by true and predicted class; 0 where they may have several
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
        cls, lists: Mapping[str, Sequence[float]], classes: Classes, size: tuple[int, int]
    ) -> MetricSums:
        """Read what ``to_lists`` wrote, at the other end of a wire.

        Args:
            size: height and width of the images, which bound pixels and distances.

        Raises:
            ValueError: naming the field that is missing, of another length, negative, not finite,
                or larger than the images allow.
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
            ("masked", self.annotated, self.images),
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
                "right",
                self.exact_matches,
                self.labelled if multi_label else np.trace(self.confusion),
            ),
            ("scores", with_label, self.labelled),
        )
        for name, value, largest in bounds:
            if (value > largest + 1e-6 * (1 + largest)).any():
                raise ValueError(f"{name}: expected at most {largest}, got {value}")


def empty_sums(classes: Classes) -> MetricSums:
    """The sums of no images at all."""
    k = len(classes.images)
    per_mask = (len(classes.masks),)
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("images", "lesions", "labelled", "right"), (1,)),
        "confusion": (k, k),
        "scores": (k, 2, BINS),
    }
    return MetricSums(
        **{f.name: np.zeros(shapes.get(f.name, per_mask)) for f in fields(MetricSums)}
    )
