"""The two tasks' losses: one number an example, 0 where its annotation is absent.

Per example, because differential privacy clips what one example contributes, and because a batch
may mix examples with and without a mask or a label.

Masks come in two kinds, told apart by the number of logit maps. M maps for M mask classes: each
pixel may be of any of them (sigmoid). M + 1 maps: a pixel is of one of them or of the background,
which is the first map (softmax).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyclinic.configs.schema.loss import LossConfig
from polyclinic.mtl_model.network import Prediction


class Targets(NamedTuple):
    """What is known of a batch."""

    masks: Tensor  # (B, M, H, W), float 0 or 1; anything where has_mask is False
    has_mask: Tensor  # (B, M), bool
    labels: Tensor  # (B, K), float 0 or 1, one of them 1 where classes exclude each other
    has_label: Tensor  # (B,), bool


def check_shapes(prediction: Prediction, targets: Targets) -> None:
    """Whether a prediction is of these targets.

    Raises:
        ValueError: naming what was expected and what came.
    """
    b, m, h, w = targets.masks.shape
    k = targets.labels.shape[1]
    wanted: list[tuple[str, Tensor | None, set[tuple[int, ...]]]] = [
        ("has_mask", targets.has_mask, {(b, m)}),
        ("labels", targets.labels, {(b, k)}),
        ("has_label", targets.has_label, {(b,)}),
        ("mask logits", prediction.mask_logits, {(b, m, h, w), (b, m + 1, h, w)}),
        ("class logits", prediction.class_logits, {(b, k)}),
    ]
    for name, found, shapes in wanted:
        if found is not None and tuple(found.shape) not in shapes:
            raise ValueError(
                f"{name}: expected {' or '.join(map(str, sorted(shapes)))} beside masks of "
                f"{(b, m, h, w)}, got {tuple(found.shape)}"
            )


class Losses(NamedTuple):
    """A batch's losses, each (B,)."""

    total: Tensor
    segmentation: Tensor
    classification: Tensor


def soft_dice_loss(logits: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice of each example and mask class; a softmax's background has none.

    ``smooth`` pixels are added above and below, so that an empty mask met with an empty
    prediction costs nothing.

    Shapes:
        logits: (B, M, H, W), or (B, M + 1, H, W) for a softmax
        masks:  (B, M, H, W)
        out:    (B, M)
    """
    probability = torch.softmax(logits, 1)[:, 1:] if _softmax(logits, masks) else logits.sigmoid()
    overlap = (probability * masks).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    return 1 - (2 * overlap + smooth) / (total + smooth)


def focal_loss(logits: Tensor, masks: Tensor, gamma: float) -> Tensor:
    """Focal loss (Lin et al., 2017, without its alpha) averaged over each example's pixels.

    A pixel costs -(1 - p)^gamma log p, where p is the probability of what is true there: of the
    mask class being there or not, or, under a softmax, of the pixel's one class. With gamma 0 that
    is cross-entropy.

    Shapes:
        logits, masks: as ``soft_dice_loss``
        out:           (B, M), or (B, 1) for a softmax
    """
    odds = _log_odds_of_truth(logits, masks)
    surprise = -F.logsigmoid(odds)  # -log p
    if gamma > 0:
        surprise = surprise * torch.exp(gamma * F.logsigmoid(-odds))  # of 1 - p, never log 0
    return surprise.mean(dim=(2, 3))


def _log_odds_of_truth(logits: Tensor, masks: Tensor) -> Tensor:
    """log(p / (1 - p)) of what is true at each pixel: (B, M, H, W), or (B, 1, H, W)."""
    if not _softmax(logits, masks):
        return logits * (2 * masks - 1)
    true = torch.cat([1 - masks.sum(1, keepdim=True), masks], dim=1) > 0.5
    of_true = (logits * true).sum(1, keepdim=True)
    return of_true - logits.masked_fill(true, float("-inf")).logsumexp(1, keepdim=True)


def _softmax(logits: Tensor, masks: Tensor) -> bool:
    return logits.shape[1] > masks.shape[1]


def segmentation_loss(
    logits: Tensor, masks: Tensor, has_mask: Tensor, config: LossConfig
) -> Tensor:
    """The mean over each example's annotated mask classes; 0 where none is.

    Shapes:
        logits, masks: as ``soft_dice_loss``
        has_mask:      (B, M)
        out:           (B,)
    """
    masks = torch.where(has_mask[:, :, None, None], masks, torch.zeros_like(masks))
    each = soft_dice_loss(logits, masks)
    if config.segmentation == "dice+ce":
        each = each + focal_loss(logits, masks, gamma=0.0)
    elif config.segmentation == "dice+focal":
        each = each + focal_loss(logits, masks, config.focal_gamma)
    known = torch.where(has_mask, each, torch.zeros_like(each))
    return known.sum(1) / has_mask.sum(1).clamp(min=1)


def classification_loss(
    logits: Tensor, labels: Tensor, config: LossConfig, class_weights: Tensor | None
) -> Tensor:
    """Cross-entropy of the one class, or the mean over classes of each one's own (soft margin).

    Label smoothing gives a share of the label to all classes alike; under soft margin, where each
    class is a question of yes or no, that draws both answers toward 0.5.

    Shapes:
        logits, labels: (B, K)
        class_weights:  (K,)
        out:            (B,)
    """
    smoothing = config.label_smoothing
    if config.classification == "soft-margin":
        labels = labels * (1 - smoothing) + smoothing / 2
        return F.multilabel_soft_margin_loss(logits, labels, class_weights, reduction="none")
    return F.cross_entropy(
        logits,
        labels.argmax(1),
        weight=class_weights,
        reduction="none",
        label_smoothing=smoothing,
    )


def multi_task_loss(
    prediction: Prediction,
    targets: Targets,
    config: LossConfig,
    class_weights: Tensor | None = None,
) -> Losses:
    """Segmentation plus weighted classification, example by example.

    Logits are taken to float32 first, so that mixed precision does not round the sums.

    Args:
        class_weights: (K,), or None for 1 each.

    Raises:
        ValueError: if shapes do not belong together, or the weights are to be learned and the
            network has none.
    """
    check_shapes(prediction, targets)
    zero = torch.zeros(len(targets.labels), device=targets.labels.device)
    segmentation = classification = zero
    has_mask = has_label = torch.zeros_like(targets.has_label)
    if prediction.mask_logits is not None:
        has_mask = targets.has_mask.any(1)
        logits = prediction.mask_logits.float()
        segmentation = segmentation_loss(logits, targets.masks, targets.has_mask, config)
    if prediction.class_logits is not None:
        has_label = targets.has_label
        logits = prediction.class_logits.float()
        labels = torch.where(has_label[:, None], targets.labels, torch.zeros_like(targets.labels))
        each = classification_loss(logits, labels, config, class_weights)
        classification = torch.where(has_label, each, zero)
    if config.weighting == "uncertainty":
        if prediction.log_variances is None:
            raise ValueError(
                "loss.weighting uncertainty: expected a network in training mode with log "
                "variances to learn, got none"
            )
        known = torch.stack([has_mask, has_label], dim=1)
        each = torch.stack([segmentation, classification], dim=1)
        total = _weighed_by_uncertainty(each, known, prediction.log_variances.float())
    else:
        total = segmentation + config.classification_weight * classification
    return Losses(total, segmentation, classification)


def _weighed_by_uncertainty(losses: Tensor, known: Tensor, log_variances: Tensor) -> Tensor:
    """Kendall, Gal, Cipolla 2018: exp(-s) loss + s / 2 of every task that the example shows.

    Shapes:
        losses, known, log_variances: (B, 2), segmentation first
        out:                          (B,)
    """
    each = torch.exp(-log_variances) * losses + log_variances / 2
    return torch.where(known, each, torch.zeros_like(each)).sum(1)


def balanced_class_weights(counts: Tensor) -> Tensor:
    """Weights inverse to frequency, 1 on average over the labels that were counted.

    A class without examples gets 1: under cross-entropy its weight is never used.

    Shapes:
        counts and out: (K,)
    """
    present = counts > 0
    share = counts.float() / counts.sum().clamp(min=1)
    weights = 1 / (share * present.sum())
    return torch.where(present, weights, torch.ones_like(weights))
