"""Learned task weights: their start values, their gradients, and when they stay fixed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyclinic.client.training.local_round import Round, train_one_round
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.losses import multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet, Prediction, build_model, network_of
from polyclinic.mtl_model.uncertainty import Uncertainty
from tests.factories import CPU, DATA, SMALL, ModelConfig, batch, some

LEARNED = LossConfig(weighting="uncertainty", classification_weight=0.25)


def learning() -> MultiTaskUNet:
    return build_model(
        ModelConfig(**SMALL),
        size=(32, 32),
        in_channels=1,
        image_classes=2,
        uncertainty=Uncertainty(1.0, 0.25),
        seed=0,
    )


def trained(*, masks: bool = True, labels: bool = True) -> tuple[float, float]:
    """Return both log variances after a round with strong weight decay."""
    model = learning()
    train_one_round(
        model,
        some(masks=masks, labels=labels),
        Round(1, 2, 0, "a"),
        data=DATA,
        train=TrainConfig(batch_size=4, weight_decay=0.5),
        loss=LEARNED,
        device=CPU,
    )
    return (
        model.uncertainty.segmentation.value.item(),
        model.uncertainty.classification.value.item(),
    )


def test_uncertainty_starts_at_the_fixed_weights() -> None:
    prediction, targets = batch()
    fixed = multi_task_loss(prediction, targets, LossConfig(classification_weight=0.25))
    start = Uncertainty(1.0, 0.25)(prediction.class_logits)
    assert start.tolist() == [[0.0, pytest.approx(math.log(4))]] * 4
    learned = multi_task_loss(prediction._replace(log_variances=start), targets, LEARNED)
    # the rest is s / 2, only of classification, since that of segmentation starts at 0
    rest = torch.where(targets.has_label, math.log(4) / 2, 0.0)
    torch.testing.assert_close(learned.total, fixed.total + rest)


def test_only_annotated_tasks_count_and_train_their_variance() -> None:
    prediction, targets = batch()  # masks at examples 0 and 2, labels at 0 and 1
    s = torch.tensor([[0.7, -0.3]]).repeat(4, 1).requires_grad_()
    losses = multi_task_loss(prediction._replace(log_variances=s), targets, LEARNED)
    both, labelled = losses.total[0], losses.total[1]
    segmentation, classification = losses.segmentation[0], losses.classification
    expected = math.exp(-0.7) * segmentation + 0.35 + math.exp(0.3) * classification[0] - 0.15
    assert both.item() == pytest.approx(expected.item())
    assert labelled.item() == pytest.approx((math.exp(0.3) * classification[1] - 0.15).item())
    assert losses.total[3] == 0
    losses.total.sum().backward()
    assert (s.grad != 0).tolist() == [[True, True], [False, True], [True, False], [False, False]]


def test_uncomputed_task_leaves_its_variance_unchanged() -> None:
    prediction, targets = batch()
    s = torch.ones(4, 2, requires_grad=True)
    alone = Prediction(None, prediction.class_logits, s)
    multi_task_loss(alone, targets, LEARNED).total.sum().backward()
    assert not s.grad[:, 0].any()
    assert s.grad[:2, 1].all()


def test_optimal_variance_is_twice_the_loss() -> None:
    """exp(-s) L + s / 2 is smallest where exp(s) = 2 L."""
    prediction, targets = batch()
    uncertainty = Uncertainty(1.0, 1.0)
    optimizer = torch.optim.LBFGS(uncertainty.parameters(), line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        prediction_ = prediction._replace(log_variances=uncertainty(prediction.class_logits))
        total = multi_task_loss(prediction_, targets, LEARNED).total.sum()
        total.backward()
        return total

    for _ in range(5):
        optimizer.step(loss)
    losses = multi_task_loss(prediction, targets, LossConfig())
    for module, each in (
        (uncertainty.segmentation, losses.segmentation),
        (uncertainty.classification, losses.classification),
    ):
        assert module.value.exp().item() == pytest.approx(
            2 * each[each > 0].mean().item(), rel=1e-3
        )


def test_network_without_variances_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss.weighting uncertainty: expected a network"):
        multi_task_loss(*batch(), LEARNED)


def test_variances_exist_on_request_and_are_returned_in_training() -> None:
    assert network_of(ModelConfig(**SMALL), DATA, LossConfig(), seed=0).uncertainty is None
    model = network_of(ModelConfig(**SMALL), DATA, LEARNED, seed=0)
    images = torch.randn(2, 1, 32, 32)
    assert model.train()(images).log_variances.shape == (2, 2)
    assert model.eval()(images).log_variances is None


def test_round_updates_variances_of_trained_tasks_only() -> None:
    start = (0.0, math.log(4))
    both = trained()
    assert both[0] != start[0]
    assert both[1] != pytest.approx(start[1])
    assert trained(masks=False)[0] == start[0]
    # weight decay would have halved it
    assert trained(labels=False)[1] == pytest.approx(start[1], abs=1e-7)
