"""The two tasks' losses: one number an example, 0 where its annotation is absent.

Per example, because differential privacy clips what one example contributes, and because a batch
may mix examples with and without a mask or a label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.run import LossConfig
from mtl_model.network import Prediction


class Targets(NamedTuple):
    """What is known of a batch."""

    masks: Tensor  # (B, M, H, W), float 0 or 1; anything where has_mask is False
    has_mask: Tensor  # (B,), bool
    labels: Tensor  # (B,), int64; -1 for none

    @property
    def has_label(self) -> Tensor:
        return self.labels >= 0


class Losses(NamedTuple):
    """A batch's losses, each (B,)."""

    total: Tensor
    segmentation: Tensor
    classification: Tensor


def soft_dice_loss(logits: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice of each example, averaged over mask classes.

    ``smooth`` pixels are added above and below, so that an empty mask met with an empty
    prediction costs nothing.

    Shapes:
        logits, masks: (B, M, H, W)
        out:           (B,)
    """
    probability = torch.sigmoid(logits)
    overlap = (probability * masks).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean(dim=1)


def pixel_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy averaged over each example's pixels.

    Shapes:
        logits, masks: (B, M, H, W)
        out:           (B,)
    """
    return F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(dim=(1, 2, 3))


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
    """
    zero = torch.zeros(len(targets.labels), device=targets.labels.device)
    segmentation = classification = zero
    if prediction.mask_logits is not None:
        logits = prediction.mask_logits.float()
        segmentation = soft_dice_loss(logits, targets.masks)
        if config.segmentation == "dice+bce":
            segmentation = segmentation + pixel_cross_entropy(logits, targets.masks)
        segmentation = torch.where(targets.has_mask, segmentation, zero)
    if prediction.class_logits is not None:
        classification = F.cross_entropy(
            prediction.class_logits.float(),
            targets.labels.clamp(min=0),
            weight=class_weights,
            reduction="none",
        )
        classification = torch.where(targets.has_label, classification, zero)
    total = segmentation + config.classification_weight * classification
    return Losses(total, segmentation, classification)


def balanced_class_weights(counts: Tensor) -> Tensor:
    """Weights inverse to frequency, 1 on average over the examples that were counted.

    A class without examples gets 1: its weight is never used.

    Shapes:
        counts and out: (K,)
    """
    present = counts > 0
    share = counts.float() / counts.sum().clamp(min=1)
    weights = 1 / (share * present.sum())
    return torch.where(present, weights, torch.ones_like(weights))
