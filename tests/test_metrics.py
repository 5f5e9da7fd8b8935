"""Metrics against scikit-learn, by hand, and where they are undefined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from mtl_model.losses import Targets
from mtl_model.metrics import MetricSums, area_under_curve, batch_sums, compute, empty_sums
from mtl_model.network import Prediction


def random_batch(seed: int, n: int = 60, classes: int = 3) -> tuple[Prediction, Targets]:
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(n, 1, 8, 8, generator=generator) > 0.6).float()
    masks[::5] = 0  # images without a lesion
    logits = masks * 2 - 1 + torch.randn(n, 1, 8, 8, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    scores = torch.randn(n, classes, generator=generator)
    scores[torch.arange(n), labels] += 1
    has_mask = torch.rand(n, generator=generator) > 0.2
    labels[torch.rand(n, generator=generator) > 0.8] = -1
    return Prediction(logits, scores), Targets(masks, has_mask, labels)


def test_classification_agrees_with_scikit_learn() -> None:
    prediction, targets = random_batch(0, n=400)
    ours = compute(batch_sums(prediction, targets, 3), positive=1)
    known = targets.has_label
    true = targets.labels[known].numpy()
    guess = prediction.class_logits[known].argmax(1).numpy()
    score = torch.softmax(prediction.class_logits[known], 1)[:, 1].numpy()
    assert ours.labelled == len(true)
    assert ours.accuracy == pytest.approx(reference.accuracy_score(true, guess))
    assert ours.balanced_accuracy == pytest.approx(reference.balanced_accuracy_score(true, guess))
    assert ours.sensitivity == pytest.approx(reference.recall_score(true == 1, guess == 1))
    assert ours.specificity == pytest.approx(reference.recall_score(true != 1, guess != 1))
    assert ours.auc == pytest.approx(reference.roc_auc_score(true == 1, score), abs=0.005)


def test_segmentation_agrees_with_scikit_learn() -> None:
    prediction, targets = random_batch(1)
    ours = compute(batch_sums(prediction, targets, 3), positive=1)
    dice, iou, alarms, true, guess = [], [], [], [], []
    for i in torch.where(targets.has_mask)[0]:
        mask = targets.masks[i].flatten().numpy() > 0
        predicted = prediction.mask_logits[i].flatten().numpy() > 0
        true.append(mask)
        guess.append(predicted)
        if mask.any():
            dice.append(reference.f1_score(mask, predicted))
            iou.append(reference.jaccard_score(mask, predicted))
        else:
            alarms.append(predicted.any())
    assert ours.lesions == len(dice)
    assert ours.dice == pytest.approx(np.mean(dice))
    assert ours.iou == pytest.approx(np.mean(iou))
    assert ours.false_positive_rate == pytest.approx(np.mean(alarms))
    pooled = reference.f1_score(np.concatenate(true), np.concatenate(guess))
    assert ours.pooled_dice == pytest.approx(pooled)


@given(cut=st.integers(1, 59))
@settings(max_examples=15, deadline=None)
def test_sums_of_parts_are_the_sums_of_the_whole(cut: int) -> None:
    prediction, targets = random_batch(2)

    def part(s: slice) -> MetricSums:
        return batch_sums(
            Prediction(*(t[s] for t in prediction)), Targets(*(t[s] for t in targets)), 3
        )

    whole = part(slice(None)).to_lists()
    added = (part(slice(cut)) + part(slice(cut, None))).to_lists()
    for name, values in whole.items():
        assert added[name] == pytest.approx(values), name


def test_sums_survive_the_wire() -> None:
    sums = batch_sums(*random_batch(3), 3)
    again = MetricSums.from_lists(sums.to_lists(), mask_classes=1, image_classes=3)
    assert compute(again, 1) == compute(sums, 1)


def test_what_is_undefined_is_none_and_never_a_number() -> None:
    nothing = compute(empty_sums(1, 2), positive=1)
    assert {v for k, v in vars(nothing).items() if k not in ("images", "lesions", "labelled")} == {
        None
    }
    assert nothing.value("score") is None
    assert nothing.brief() == "Dice -, balanced accuracy -, AUC - (n 0)"
    targets = Targets(torch.zeros(2, 1, 4, 4), torch.tensor([False, False]), torch.tensor([0, 0]))
    one_class = compute(batch_sums(Prediction(None, torch.eye(2)), targets, 2), positive=1)
    assert one_class.dice is None
    assert one_class.accuracy == 0.5
    assert one_class.balanced_accuracy is None
    assert one_class.sensitivity is None
    assert one_class.specificity == 0.5
    assert one_class.auc is None


def test_the_score_is_the_mean_of_what_is_defined() -> None:
    prediction, targets = random_batch(4)
    both = compute(batch_sums(prediction, targets, 3), 1)
    assert both.value("score") == pytest.approx((both.dice + both.balanced_accuracy) / 2)
    assert both.value("balanced-accuracy") == both.balanced_accuracy
    masks_only = compute(batch_sums(Prediction(prediction.mask_logits, None), targets, 3), 1)
    assert masks_only.value("score") == masks_only.dice


def test_area_under_curve_by_hand() -> None:
    # scores: one positive above, one tied with, one below the single negative
    assert area_under_curve(np.array([1.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0])) == 0.5
    assert area_under_curve(np.array([0.0, 2.0]), np.array([3.0, 0.0])) == 1.0
    assert area_under_curve(np.array([0.0, 0.0]), np.array([3.0, 0.0])) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dice": None}, "dice: expected"),
        ({"dice": [1.0, 2.0]}, "dice: expected .* got 2 numbers"),
        ({"dice": [float("nan")]}, "dice: expected finite"),
        ({"dice": [-1.0]}, "dice: expected finite sums of 0 or more"),
        ({"dice": [1e9]}, "dice: expected at most"),
        ({"images": [1.0]}, "masked: expected at most"),
        ({"confusion": [1e3] * 9}, "confusion: expected at most"),
    ],
)
def test_impossible_sums_are_refused_by_name(change: dict, said: str) -> None:
    lists = batch_sums(*random_batch(5), 3).to_lists()
    lists.update(change)
    lists = {name: values for name, values in lists.items() if values is not None}
    with pytest.raises(ValueError, match=said):
        MetricSums.from_lists(lists, mask_classes=1, image_classes=3)
