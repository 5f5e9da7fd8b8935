"""Losses: by hand, against an independent implementation, and masked where nothing is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from configs.run import LossConfig
from mtl_model.losses import (
    Targets,
    balanced_class_weights,
    multi_task_loss,
    soft_dice_loss,
)
from mtl_model.network import Prediction


def batch() -> tuple[Prediction, Targets]:
    generator = torch.Generator().manual_seed(0)
    prediction = Prediction(
        torch.randn(4, 1, 8, 8, generator=generator), torch.randn(4, 3, generator=generator)
    )
    masks = (torch.rand(4, 1, 8, 8, generator=generator) > 0.5).float()
    known = torch.tensor([True, False, True, False])
    return prediction, Targets(masks, known, torch.tensor([2, 0, -1, -1]))


def test_soft_dice_by_hand() -> None:
    logits = torch.full((1, 1, 2, 2), 100.0)  # every pixel predicted
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert soft_dice_loss(logits, masks).item() == pytest.approx(1 - (2 + 1) / (4 + 1 + 1))


def test_an_empty_mask_met_with_an_empty_prediction_costs_nothing() -> None:
    loss = soft_dice_loss(torch.full((1, 1, 4, 4), -100.0), torch.zeros(1, 1, 4, 4))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_losses_are_zero_where_the_annotation_is_absent_and_so_is_their_gradient() -> None:
    prediction, targets = batch()
    prediction = Prediction(*(t.requires_grad_() for t in prediction))
    losses = multi_task_loss(prediction, targets, LossConfig())
    assert (losses.segmentation > 0).tolist() == [True, False, True, False]
    assert (losses.classification > 0).tolist() == [True, True, False, False]
    losses.total.sum().backward()
    assert prediction.mask_logits.grad[1].abs().sum() == 0
    assert prediction.mask_logits.grad[3].abs().sum() == 0
    assert prediction.class_logits.grad[2:].abs().sum() == 0


def test_the_total_weighs_the_two_tasks() -> None:
    prediction, targets = batch()
    losses = multi_task_loss(prediction, targets, LossConfig(classification_weight=0.25))
    expected = losses.segmentation + 0.25 * losses.classification
    torch.testing.assert_close(losses.total, expected)


def test_the_segmentation_loss_is_dice_plus_cross_entropy() -> None:
    prediction, targets = batch()
    both = multi_task_loss(prediction, targets, LossConfig(segmentation="dice+bce")).segmentation
    dice = multi_task_loss(prediction, targets, LossConfig(segmentation="dice")).segmentation
    entropy = F.binary_cross_entropy_with_logits(prediction.mask_logits[0], targets.masks[0])
    assert (both - dice)[0].item() == pytest.approx(entropy.item(), rel=1e-5)


def test_class_weights_scale_the_examples_of_their_class() -> None:
    prediction, targets = batch()
    plain = multi_task_loss(prediction, targets, LossConfig()).classification
    weighted = multi_task_loss(
        prediction, targets, LossConfig(), torch.tensor([2.0, 1.0, 5.0])
    ).classification
    torch.testing.assert_close(weighted[:2], plain[:2] * torch.tensor([5.0, 2.0]))


def test_a_task_that_was_not_computed_costs_nothing() -> None:
    prediction, targets = batch()
    losses = multi_task_loss(Prediction(None, prediction.class_logits), targets, LossConfig())
    assert losses.segmentation.sum() == 0
    assert losses.total.shape == (4,)


def test_balanced_weights_make_classes_count_alike_and_examples_one_on_average() -> None:
    counts = torch.tensor([30, 10, 0])
    weights = balanced_class_weights(counts)
    assert (counts * weights)[:2].tolist() == pytest.approx([20.0, 20.0])
    assert (counts * weights).sum().item() == pytest.approx(40.0)
    assert weights[2] == 1
    assert balanced_class_weights(torch.zeros(2, dtype=torch.int64)).tolist() == [1.0, 1.0]
