"""Losses: by hand, against independent implementations, and with missing annotations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceFocalLoss, DiceLoss, FocalLoss
from torch import Tensor

from polyclinic.configs.schema.loss import LossConfig
from polyclinic.mtl_model.losses import (
    balanced_class_weights,
    classification_loss,
    focal_loss,
    multi_task_loss,
    segmentation_loss,
    soft_dice_loss,
)
from polyclinic.mtl_model.network import Prediction
from tests.factories import batch

KINDS = ["one binary", "overlapping", "exclusive"]


def some_masks(kind: str, n: int = 4) -> tuple[Tensor, Tensor]:
    """Make random logits and masks; example 0 has only empty masks."""
    generator = torch.Generator().manual_seed(1)
    classes = 1 if kind == "one binary" else 3
    if kind == "exclusive":
        index = torch.randint(4, (n, 8, 8), generator=generator)
        masks = F.one_hot(index, 4).movedim(3, 1)[:, 1:].float()
    else:
        masks = (torch.rand(n, classes, 8, 8, generator=generator) > 0.6).float()
    masks[0] = 0
    maps = classes + (kind == "exclusive")
    return 3 * torch.randn(n, maps, 8, 8, generator=generator), masks


def with_background(masks: Tensor) -> Tensor:
    return torch.cat([1 - masks.sum(1, keepdim=True), masks], dim=1)


def test_soft_dice_by_hand() -> None:
    logits = torch.full((1, 1, 2, 2), 100.0)  # every pixel predicted
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert soft_dice_loss(logits, masks).item() == pytest.approx(1 - (2 + 1) / (4 + 1 + 1))


def test_loss_of_empty_mask_and_empty_prediction_is_zero() -> None:
    loss = soft_dice_loss(torch.full((1, 1, 4, 4), -100.0), torch.zeros(1, 1, 4, 4))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    background = torch.tensor([100.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 4, 4)
    for loss in (soft_dice_loss, lambda *maps: focal_loss(*maps, gamma=2.0)):
        assert loss(background, torch.zeros(1, 2, 4, 4)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_soft_dice_agrees_with_monai(kind: str) -> None:
    logits, masks = some_masks(kind)
    if kind == "exclusive":
        reference = DiceLoss(softmax=True, include_background=False, **dice_settings())
        expected = reference(logits, with_background(masks))
    else:
        expected = DiceLoss(sigmoid=True, **dice_settings())(logits, masks)
    torch.testing.assert_close(soft_dice_loss(logits, masks), expected[..., 0, 0])


def dice_settings() -> dict[str, object]:
    return {"reduction": "none", "smooth_nr": 1.0, "smooth_dr": 1.0}


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_focal_loss_agrees_with_monai(kind: str, gamma: float) -> None:
    logits, masks = some_masks(kind)
    if kind == "exclusive":
        # MONAI puts a pixel's loss at its class and 0 at the others; their sum is the pixel's loss
        reference = FocalLoss(use_softmax=True, gamma=gamma, reduction="none")
        expected = reference(logits, with_background(masks)).sum(1, keepdim=True)
    else:
        expected = FocalLoss(gamma=gamma, reduction="none")(logits, masks)
    torch.testing.assert_close(focal_loss(logits, masks, gamma), expected.mean(dim=(2, 3)))


def test_dice_plus_focal_agrees_with_monai() -> None:
    logits, masks = some_masks("overlapping")
    ours = segmentation_loss(
        logits, masks, torch.ones(4, 3, dtype=torch.bool), LossConfig(segmentation="dice+focal")
    )
    reference = DiceFocalLoss(
        sigmoid=True, gamma=2.0, smooth_nr=1.0, smooth_dr=1.0, reduction="mean"
    )
    each = [reference(logits[i : i + 1], masks[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(ours, torch.stack(each))


@pytest.mark.parametrize("kind", KINDS)
def test_segmentation_loss_is_dice_plus_cross_entropy(kind: str) -> None:
    logits, masks = some_masks(kind)
    known = torch.ones(masks.shape[:2], dtype=torch.bool)
    both = segmentation_loss(logits, masks, known, LossConfig(segmentation="dice+ce"))
    dice = segmentation_loss(logits, masks, known, LossConfig(segmentation="dice"))
    if kind == "exclusive":
        entropy = F.cross_entropy(logits, with_background(masks).argmax(1), reduction="none")
        expected = entropy.mean(dim=(1, 2))
    else:
        entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
        expected = entropy.mean(dim=(1, 2, 3))
    torch.testing.assert_close(both - dice, expected)


@pytest.mark.parametrize("segmentation", ["dice", "dice+ce", "dice+focal"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_large_logits_are_finite(kind: str, segmentation: str) -> None:
    logits, masks = some_masks(kind)
    logits = (200 * logits).requires_grad_()
    known = torch.ones(masks.shape[:2], dtype=torch.bool)
    config = LossConfig(segmentation=segmentation, focal_gamma=0.5)
    loss = segmentation_loss(logits, masks, known, config)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_segmentation_loss_averages_annotated_mask_classes() -> None:
    logits, masks = some_masks("overlapping")
    known = torch.tensor(
        [[True, True, True], [True, False, True], [False, False, True], [False, False, False]]
    )
    logits.requires_grad_()
    ours = segmentation_loss(logits, masks, known, LossConfig(segmentation="dice+ce"))
    each = soft_dice_loss(logits, masks) + focal_loss(logits, masks, gamma=0.0)
    assert ours[1].item() == pytest.approx((each[1, 0] + each[1, 2]).item() / 2)
    assert ours[2].item() == pytest.approx(each[2, 2].item())
    assert ours[3] == 0
    ours.sum().backward()
    reached = logits.grad.abs().sum(dim=(2, 3)) > 0
    assert torch.equal(reached, known)


def test_missing_annotation_gives_zero_loss_and_gradient() -> None:
    prediction, targets = batch()
    prediction = Prediction(
        prediction.mask_logits.requires_grad_(), prediction.class_logits.requires_grad_()
    )
    losses = multi_task_loss(prediction, targets, LossConfig())
    assert (losses.segmentation > 0).tolist() == [True, False, True, False]
    assert (losses.classification > 0).tolist() == [True, True, False, False]
    losses.total.sum().backward()
    assert prediction.mask_logits.grad[1].abs().sum() == 0
    assert prediction.mask_logits.grad[3].abs().sum() == 0
    assert prediction.class_logits.grad[2:].abs().sum() == 0


@pytest.mark.parametrize("segmentation", ["dice", "dice+ce", "dice+focal"])
@pytest.mark.parametrize("classification", ["cross-entropy", "soft-margin"])
@pytest.mark.parametrize("maps", [1, 2])
def test_values_of_missing_annotations_are_ignored(
    segmentation: str, classification: str, maps: int
) -> None:
    prediction, targets = batch()
    logits = prediction.mask_logits.repeat(1, maps, 1, 1).requires_grad_()
    scores = prediction.class_logits.requires_grad_()
    config = LossConfig(segmentation=segmentation, classification=classification)
    given = []
    for junk in (0.0, float("nan")):
        masks = torch.where(targets.has_mask[..., None, None], targets.masks, junk)
        labels = torch.where(targets.has_label[:, None], targets.labels, junk)
        hurt = targets._replace(masks=masks, labels=labels)
        total = multi_task_loss(Prediction(logits, scores), hurt, config).total
        given.append((total, *torch.autograd.grad(total.sum(), (logits, scores))))
    for found, expected in zip(*reversed(given), strict=True):
        assert found.isfinite().all()
        assert torch.equal(found, expected)


def test_mismatched_shapes_are_refused() -> None:
    prediction, targets = batch()
    five = prediction._replace(mask_logits=torch.zeros(4, 5, 8, 8))
    with pytest.raises(ValueError, match=r"mask logits: expected .*got \(4, 5, 8, 8\)"):
        multi_task_loss(five, targets, LossConfig())
    with pytest.raises(ValueError, match=r"has_mask: expected \(4, 1\)"):
        multi_task_loss(prediction, targets._replace(has_mask=torch.ones(4) > 0), LossConfig())


def test_total_loss_weights_the_two_tasks() -> None:
    prediction, targets = batch()
    losses = multi_task_loss(prediction, targets, LossConfig(classification_weight=0.25))
    expected = losses.segmentation + 0.25 * losses.classification
    torch.testing.assert_close(losses.total, expected)


def test_class_weights_scale_the_examples_of_their_class() -> None:
    prediction, targets = batch()
    plain = multi_task_loss(prediction, targets, LossConfig()).classification
    weighted = multi_task_loss(
        prediction, targets, LossConfig(), torch.tensor([2.0, 1.0, 5.0])
    ).classification
    torch.testing.assert_close(weighted[:2], plain[:2] * torch.tensor([5.0, 2.0]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_with_weights_and_smoothing_by_definition(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, index = torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([0.5, 1.0, 3.0])
    labels = torch.eye(3)[index]
    config = LossConfig(label_smoothing=smoothing)
    ours = classification_loss(logits, labels, config, weights)
    wanted = labels * (1 - smoothing) + smoothing / 3
    by_definition = -(weights * wanted * torch.log_softmax(logits, 1)).sum(1)
    torch.testing.assert_close(ours, by_definition)
    theirs = F.cross_entropy(logits, index, weights, label_smoothing=smoothing)
    torch.testing.assert_close(ours.sum() / weights[index].sum(), theirs)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0])], ids=["none", "weights"])
def test_soft_margin_agrees_with_torch(weights: Tensor | None) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
    config = LossConfig(classification="soft-margin")
    ours = classification_loss(logits, labels, config, weights)
    for i in range(4):
        theirs = F.multilabel_soft_margin_loss(logits[i : i + 1], labels[i : i + 1], weights)
        assert ours[i].item() == pytest.approx(theirs.item())


def test_soft_margin_smoothing_moves_targets_towards_one_half() -> None:
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    config = LossConfig(classification="soft-margin", label_smoothing=0.2)
    ours = classification_loss(logits, labels, config, None)
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor([[0.9, 0.1]]))
    assert ours.item() == pytest.approx(expected.item())


def test_task_without_logits_has_zero_loss() -> None:
    prediction, targets = batch()
    losses = multi_task_loss(Prediction(None, prediction.class_logits), targets, LossConfig())
    assert losses.segmentation.sum() == 0
    assert losses.total.shape == (4,)


def test_balanced_weights_equalise_classes_with_mean_one() -> None:
    counts = torch.tensor([30, 10, 0])
    weights = balanced_class_weights(counts)
    assert (counts * weights)[:2].tolist() == pytest.approx([20.0, 20.0])
    assert (counts * weights).sum().item() == pytest.approx(40.0)
    assert weights[2] == 1
    assert balanced_class_weights(torch.zeros(2, dtype=torch.int64)).tolist() == [1.0, 1.0]
