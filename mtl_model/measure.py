"""Metric sums of a batch: predictions counted against annotations."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from polyclinic.mtl_model.distance import hausdorff_95
from polyclinic.mtl_model.losses import Targets, check_shapes
from polyclinic.mtl_model.network import Prediction
from polyclinic.mtl_model.sums import (
    BINS,
    LARGEST_LOGIT,
    SMALL_LOGIT,
    Classes,
    Floats,
    MetricSums,
    empty_sums,
)


class NonFiniteOutputError(ValueError):
    """A prediction contains NaN or infinity and cannot be counted."""


def batch_sums(
    prediction: Prediction, targets: Targets, classes: Classes, hd95: bool = False
) -> MetricSums:
    """Count the predictions of one batch against its annotations.

    A pixel is predicted to belong to each mask class with a logit above 0, or, under a softmax
    (M + 1 maps, background first), to the class with the largest logit. An image is predicted to
    belong to the class with the largest logit, or, with multiple labels, to each class with a logit
    above 0. A task with prediction None adds nothing.

    Args:
        prediction: mask logits (B, M or M + 1, H, W) and class logits (B, K).
        targets: the annotations of the same batch.
        classes: names of the mask and image classes.
        hd95: also compute Hausdorff distances, see ``hausdorff_95``.

    Raises:
        NonFiniteOutputError: if a logit is not finite.
        ValueError: if shapes do not match.
        DistanceError: if ``hd95`` is set and MONAI is not installed.
    """
    _check(prediction, targets, classes)
    sums = empty_sums(classes)
    sums.images[:] = len(targets.labels)
    if prediction.mask_logits is not None:
        predicted = predicted_masks(prediction.mask_logits, len(classes.masks))
        _count_masks(sums, predicted, targets)
        if hd95:
            _measure_distances(sums, predicted, targets)
    if prediction.class_logits is not None:
        known = targets.has_label
        logits = prediction.class_logits[known].float()
        _count_classes(sums, logits, targets.labels[known] > 0.5, classes.multi_label)
    return sums


def _check(prediction: Prediction, targets: Targets, classes: Classes) -> None:
    check_shapes(prediction, targets)
    found = targets.masks.shape[1], targets.labels.shape[1]
    if found != (len(classes.masks), len(classes.images)):
        raise ValueError(
            f"expected targets of {len(classes.masks)} mask and {len(classes.images)} image "
            f"classes, got {found[0]} and {found[1]}"
        )
    for name, logits in (("mask", prediction.mask_logits), ("class", prediction.class_logits)):
        if logits is not None and not logits.isfinite().all():
            raise NonFiniteOutputError(f"expected finite {name} logits, got NaN or infinity")


def predicted_masks(logits: Tensor, mask_classes: int) -> Tensor:
    """Turn mask logits into masks.

    Args:
        logits: mask logits of any sign.
        mask_classes: M.

    Shapes:
        logits: (B, M, H, W) for independent classes, or (B, M + 1, H, W) for a softmax
        out:    (B, M, H, W), bool
    """
    if logits.shape[1] == mask_classes:
        return logits > 0
    index = torch.arange(1, mask_classes + 1, device=logits.device)
    return logits.argmax(dim=1, keepdim=True) == index[:, None, None]


def _count_masks(sums: MetricSums, predicted: Tensor, targets: Targets) -> None:
    actual = targets.masks > 0.5  # (B, M, H, W)
    keep = targets.has_mask  # (B, M)
    overlap = _numpy((predicted & actual).sum(dim=(2, 3)) * keep)
    p = _numpy(predicted.sum(dim=(2, 3)) * keep)
    a = _numpy(actual.sum(dim=(2, 3)) * keep)
    has = a > 0
    union = p + a - overlap
    sums.lesions[:] = has.any(axis=1).sum()
    sums.annotated[:] = _numpy(keep).sum(0)
    sums.present[:] = has.sum(0)
    sums.dice[:] = np.where(has, 2 * overlap / np.maximum(p + a, 1), 0).sum(0)
    sums.iou[:] = np.where(has, overlap / np.maximum(union, 1), 0).sum(0)
    sums.false_positives[:] = (~has & (p > 0)).sum(0)
    sums.overlap[:] = overlap.sum(0)
    sums.predicted[:] = p.sum(0)
    sums.actual[:] = a.sum(0)


def _measure_distances(sums: MetricSums, predicted: Tensor, targets: Targets) -> None:
    actual = targets.masks > 0.5
    both = predicted.any(-1).any(-1) & actual.any(-1).any(-1) & targets.has_mask  # (B, M)
    for k in range(predicted.shape[1]):
        chosen = both[:, k]
        sums.hd95_images[k] = int(chosen.sum())
        sums.hd95[k] = _numpy(hausdorff_95(predicted[chosen, k], actual[chosen, k])).sum()


def _count_classes(sums: MetricSums, logits: Tensor, true: Tensor, multi_label: bool) -> None:
    """Count labelled images, with logits (n, K) and true (n, K) bool."""
    sums.labelled[:] = len(logits)
    if multi_label:
        score = logits
        sums.exact_matches[:] = int(((logits > 0) == true).all(1).sum())
    else:
        score = _log_odds(logits)
        pair = _numpy(true.int().argmax(1)), _numpy(logits.argmax(1))
        np.add.at(sums.confusion, tuple(index.astype(np.int64) for index in pair), 1)
        sums.exact_matches[:] = np.trace(sums.confusion)
    # Each bin includes its upper edge, so that a logit of exactly 0 does not count as above 0.
    half = BINS // 2
    scale = half / math.asinh(LARGEST_LOGIT / SMALL_LOGIT)
    place = ((score.double() / SMALL_LOGIT).asinh() * scale).ceil() + half - 1
    bins = _numpy(place.clamp(0, BINS - 1)).astype(np.int64)  # (n, K)
    is_of = _numpy(true).astype(np.int64)
    for k in range(bins.shape[1]):
        np.add.at(sums.scores[k], (is_of[:, k], bins[:, k]), 1)


def _log_odds(logits: Tensor) -> Tensor:
    """Return the log odds of each class of a softmax, shifted to 0 for equally likely classes.

    Shapes:
        logits and out: (n, K)
    """
    itself = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
    others = logits[:, None, :].masked_fill(itself, float("-inf")).logsumexp(dim=2)
    return logits - others + math.log(max(logits.shape[1] - 1, 1))


def _numpy(tensor: Tensor) -> Floats:
    return tensor.detach().cpu().numpy().astype(np.float64)
