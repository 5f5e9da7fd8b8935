"""Segmentation and classification losses, one value per example.

Losses are per example because differential privacy clips each example's contribution, and because a
batch may mix examples with and without a mask or a label. The loss of a task is 0 for examples
without its annotation.

The number of mask logits per pixel selects one of two kinds of segmentation. M logits for M mask
classes: each pixel may belong to any subset of the classes (sigmoid). M + 1 logits: each pixel
belongs to exactly one of the classes or to the background, which is the first logit (softmax).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyclinic.configs.schema.loss import LossConfig
from polyclinic.mtl_model.network import Prediction


class Targets(NamedTuple):
    """The annotations of a batch."""

    masks: Tensor  # (B, M, H, W), float 0 or 1; ignored where has_mask is False
    has_mask: Tensor  # (B, M), bool, True where the mask class is annotated
    labels: Tensor  # (B, K), float 0 or 1; one-hot if classes exclude each other
    has_label: Tensor  # (B,), bool, True where the image is labelled


def check_shapes(prediction: Prediction, targets: Targets) -> None:
    """Check that a prediction and targets have matching shapes.

    Raises:
        ValueError: if they do not. The message gives the expected and the actual shape.
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
                f"{name}: expected {' or '.join(map(str, sorted(shapes)))} for masks of shape "
                f"{(b, m, h, w)}, got {tuple(found.shape)}"
            )


class Losses(NamedTuple):
    """The losses of a batch, each of shape (B,)."""

    total: Tensor
    segmentation: Tensor
    classification: Tensor


def soft_dice_loss(logits: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """Compute 1 - soft Dice of each example and mask class, excluding a softmax's background.

    Args:
        logits: mask logits.
        masks: true masks, 0 or 1.
        smooth: added to numerator and denominator, in pixels, so that the loss of an empty
            prediction for an empty mask is 0.

    Shapes:
        logits: (B, M, H, W), or (B, M + 1, H, W) for a softmax
        masks:  (B, M, H, W)
        out:    (B, M), in [0, 1]
    """
    probability = torch.softmax(logits, 1)[:, 1:] if _softmax(logits, masks) else logits.sigmoid()
    overlap = (probability * masks).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    return 1 - (2 * overlap + smooth) / (total + smooth)


def focal_loss(logits: Tensor, masks: Tensor, gamma: float) -> Tensor:
    """Compute the focal loss (Lin et al., 2017, without alpha), averaged over pixels.

    The loss of a pixel is -(1 - p)^gamma log p, where p is the predicted probability of the truth:
    of the mask class's presence or absence at this pixel, or, under a softmax, of the pixel's
    class. With gamma 0 it equals cross-entropy.

    Shapes:
        logits, masks: as in ``soft_dice_loss``
        out:           (B, M), or (B, 1) for a softmax; 0 or more
    """
    odds = _log_odds_of_truth(logits, masks)
    surprise = -F.logsigmoid(odds)  # -log p
    if gamma > 0:
        # logsigmoid(-odds) is log(1 - p), computed without taking the logarithm of 0.
        surprise = surprise * torch.exp(gamma * F.logsigmoid(-odds))
    return surprise.mean(dim=(2, 3))


def _log_odds_of_truth(logits: Tensor, masks: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the truth at each pixel: (B, M, H, W), or (B, 1, H, W)."""
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
    """Average the segmentation loss over the annotated mask classes of each example.

    Shapes:
        logits, masks: as in ``soft_dice_loss``
        has_mask:      (B, M), bool
        out:           (B,), 0 for examples without an annotated mask class
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
    """Compute the classification loss of each example.

    The loss is cross-entropy over exclusive classes, or, for ``soft-margin``, the mean over classes
    of a binary cross-entropy per class. Label smoothing distributes a share of the label evenly
    over all classes; under soft margin it moves each class's target toward 0.5.

    Shapes:
        logits, labels: (B, K)
        class_weights:  (K,), or None for equal weights
        out:            (B,), 0 or more
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
    """Combine the segmentation and classification losses of each example.

    Logits are converted to float32 first, so that mixed precision does not round the sums.

    Args:
        prediction: the network's output.
        targets: the annotations of the same batch.
        config: the kinds of losses and how they are weighted.
        class_weights: (K,), or None for equal weights.

    Raises:
        ValueError: if shapes do not match, or ``loss.weighting`` is ``uncertainty`` and the
            prediction has no log variances.
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
                "loss.weighting uncertainty: expected a network in training mode that was built "
                "with learned task weights, got a prediction without log variances"
            )
        known = torch.stack([has_mask, has_label], dim=1)
        each = torch.stack([segmentation, classification], dim=1)
        total = _weighed_by_uncertainty(each, known, prediction.log_variances.float())
    else:
        total = segmentation + config.classification_weight * classification
    return Losses(total, segmentation, classification)


def _weighed_by_uncertainty(losses: Tensor, known: Tensor, log_variances: Tensor) -> Tensor:
    """Sum exp(-s) * loss + s / 2 over the tasks that an example is annotated for.

    Source: Kendall, Gal, Cipolla, 2018.

    Shapes:
        losses, known, log_variances: (B, 2), segmentation first
        out:                          (B,)
    """
    each = torch.exp(-log_variances) * losses + log_variances / 2
    return torch.where(known, each, torch.zeros_like(each)).sum(1)


def balanced_class_weights(counts: Tensor) -> Tensor:
    """Compute class weights inversely proportional to frequency.

    The weights average 1 over the counted labels. A class without examples gets weight 1, which
    cross-entropy never uses.

    Shapes:
        counts: (K,), number of labels per class
        out:    (K,), float, greater than 0
    """
    present = counts > 0
    share = counts.float() / counts.sum().clamp(min=1)
    weights = 1 / (share * present.sum())
    return torch.where(present, weights, torch.ones_like(weights))
