"""Metrics: against scikit-learn, torchmetrics and MONAI, by hand, and undefined values."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import HausdorffDistanceMetric
from sklearn import metrics as reference
from torch import Tensor
from torchmetrics.functional.segmentation import dice_score, mean_iou

from polyclinic.mtl_model.distance import DistanceError, hausdorff_95
from polyclinic.mtl_model.losses import Targets
from polyclinic.mtl_model.measure import batch_sums, predicted_masks
from polyclinic.mtl_model.metrics import ImageClass, MaskClass, Metrics, area_under_curve, compute
from polyclinic.mtl_model.network import Prediction
from polyclinic.mtl_model.sums import BINS, Classes, MetricSums, empty_sums
from tests import ROOT

THREE = Classes(("lesion",), ("a", "b", "c"), positive="b")
TWO = Classes(("lesion",), ("a", "b"), positive="b")
EXCLUSIVE = Classes(("x", "y", "z"), ("a", "b", "c"), positive="b")
SEVERAL = Classes(("x", "y", "z"), ("a", "b", "c"), positive="b", multi_label=True)
KINDS = {"three classes": THREE, "exclusive masks": EXCLUSIVE, "several labels": SEVERAL}
SIZE = (8, 8)


def random_batch(seed: int, n: int = 60, classes: Classes = THREE) -> tuple[Prediction, Targets]:
    """Make a random batch in which some masks are empty and some annotations are missing."""
    generator = torch.Generator().manual_seed(seed)
    k, m = len(classes.images), len(classes.masks)
    if classes is EXCLUSIVE:
        index = torch.randint(m + 1, (n, *SIZE), generator=generator)
        index[::5] = 0
        every = torch.nn.functional.one_hot(index, m + 1).movedim(3, 1).float()
        masks = every[:, 1:]
        logits = 2 * every + torch.randn(n, m + 1, *SIZE, generator=generator)
        has_mask = (torch.rand(n, 1, generator=generator) > 0.2).expand(n, m)
    else:
        masks = (torch.rand(n, m, *SIZE, generator=generator) > 0.6).float()
        masks[::5] = 0
        masks[1::7, 0] = 0
        logits = masks * 2 - 1 + torch.randn(n, m, *SIZE, generator=generator)
        has_mask = torch.rand(n, m, generator=generator) > 0.2
    if classes.multi_label:
        labels = (torch.rand(n, k, generator=generator) > 0.6).float()
    else:
        labels = torch.eye(k)[torch.randint(k, (n,), generator=generator)]
    scores = torch.randn(n, k, generator=generator) + labels
    has_label = torch.rand(n, generator=generator) > 0.2
    return Prediction(logits, scores), Targets(masks, has_mask, labels, has_label)


def part(prediction: Prediction, targets: Targets, s: slice) -> tuple[Prediction, Targets]:
    return (
        Prediction(prediction.mask_logits[s], prediction.class_logits[s]),
        Targets(*(tensor[s] for tensor in targets)),
    )


@pytest.mark.parametrize(
    ("confidence", "lean"),
    [(1, 0), (10, 0), (30, 0), (0.1, 0), (0.001, 0), (0.3, 6), (0.1, -0.5)],
)
def test_classification_agrees_with_scikit_learn(confidence: float, lean: float) -> None:
    """Covers confident, nearly untrained and biased classifiers."""
    prediction, targets = random_batch(0, n=400)
    logits = prediction.class_logits.double() * confidence + lean * torch.eye(3)[1]
    prediction = prediction._replace(class_logits=logits)
    ours = compute(batch_sums(prediction, targets, THREE), THREE)
    known = targets.has_label
    true = targets.labels[known].argmax(1).numpy()
    guess = prediction.class_logits[known].argmax(1).numpy()
    # log odds distinguish probabilities that round to 1
    others = torch.stack(
        [logits[:, [j for j in range(3) if j != k]].logsumexp(1) for k in range(3)], 1
    )
    score = (logits - others)[known].numpy()
    assert ours.labelled == len(true)
    assert ours.accuracy == pytest.approx(reference.accuracy_score(true, guess))
    assert ours.balanced_accuracy == pytest.approx(reference.balanced_accuracy_score(true, guess))
    for k, of_class in enumerate(ours.image_classes.values()):
        assert of_class.positives == (true == k).sum()
        assert of_class.negatives == (true != k).sum()
        assert of_class.sensitivity == pytest.approx(reference.recall_score(true == k, guess == k))
        assert of_class.specificity == pytest.approx(reference.recall_score(true != k, guess != k))
        expected = reference.roc_auc_score(true == k, score[:, k])
        assert of_class.auc == pytest.approx(expected, abs=0.005)
    positive = ours.image_classes["b"]
    assert (ours.sensitivity, ours.specificity, ours.auc) == (
        positive.sensitivity,
        positive.specificity,
        positive.auc,
    )


def test_multi_label_metrics_agree_with_scikit_learn() -> None:
    prediction, targets = random_batch(0, n=400, classes=SEVERAL)
    ours = compute(batch_sums(prediction, targets, SEVERAL), SEVERAL)
    known = targets.has_label
    true = targets.labels[known].numpy()
    score = prediction.class_logits[known].numpy()
    guess = (score > 0).astype(float)
    assert ours.labelled == len(true)
    assert ours.accuracy == pytest.approx(reference.accuracy_score(true, guess))
    balanced = [reference.balanced_accuracy_score(true[:, k], guess[:, k]) for k in range(3)]
    assert ours.balanced_accuracy == pytest.approx(np.mean(balanced))
    for k, of_class in enumerate(ours.image_classes.values()):
        assert of_class.positives == true[:, k].sum()
        assert of_class.positives + of_class.negatives == len(true)
        recall = reference.recall_score(true[:, k], guess[:, k])
        assert of_class.sensitivity == pytest.approx(recall)
        assert of_class.specificity == pytest.approx(
            reference.recall_score(true[:, k], guess[:, k], pos_label=0)
        )
        expected = reference.roc_auc_score(true[:, k], score[:, k])
        assert of_class.auc == pytest.approx(expected, abs=0.005)
    assert not batch_sums(prediction, targets, SEVERAL).confusion.any()


@pytest.mark.parametrize("classes", KINDS.values(), ids=KINDS)
def test_segmentation_agrees_with_scikit_learn_and_torchmetrics(classes: Classes) -> None:
    prediction, targets = random_batch(1, classes=classes)
    ours = compute(batch_sums(prediction, targets, classes), classes)
    predicted = predicted_masks(prediction.mask_logits, len(classes.masks))
    if classes is EXCLUSIVE:
        largest = prediction.mask_logits.argmax(1)
        assert torch.equal(predicted, torch.stack([largest == k for k in (1, 2, 3)], dim=1))
    for k, name in enumerate(classes.masks):
        of_class = ours.mask_classes[name]
        known = targets.has_mask[:, k]
        true, guess = targets.masks[known, k] > 0, predicted[known, k]
        shown = true.flatten(1).any(1)
        assert of_class.annotated == known.sum()
        assert of_class.present == shown.sum()
        pair = guess[shown][:, None].long(), true[shown][:, None].long()
        assert of_class.dice == pytest.approx(
            dice_score(*pair, num_classes=1, input_format="one-hot", average="macro").mean().item()
        )
        assert of_class.iou == pytest.approx(
            mean_iou(*pair, num_classes=1, input_format="one-hot").mean().item()
        )
        pooled = reference.f1_score(true.flatten().numpy(), guess.flatten().numpy())
        assert of_class.pooled_dice == pytest.approx(pooled)
        alarms = guess[~shown].flatten(1).any(1).float()
        assert of_class.false_positive_rate == pytest.approx(alarms.mean().item())
        assert of_class.hd95 is None
    each = ours.mask_classes.values()
    assert ours.dice == pytest.approx(np.mean([c.dice for c in each]))
    assert ours.false_positive_rate == pytest.approx(np.mean([c.false_positive_rate for c in each]))
    shown_at_all = (targets.masks.sum(dim=(2, 3)) * targets.has_mask).any(1)
    assert ours.lesions == shown_at_all.sum()


def circles(seed: int, n: int, masks: int) -> Tensor:
    """Make random circles of 0 and 1, some empty, (n, masks, 24, 24)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    centre = torch.randint(4, 20, (2, n, masks, 1, 1), generator=generator)
    radius = torch.randint(0, 6, (n, masks, 1, 1), generator=generator)
    return ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2).float()


def test_hd95_agrees_with_monai() -> None:
    masks, guess = circles(0, 20, 3), circles(1, 20, 3)
    has_mask = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)) > 0.2
    targets = Targets(masks, has_mask, torch.zeros(20, 3), torch.zeros(20, dtype=torch.bool))
    prediction = Prediction(guess - 0.5, None)
    ours = compute(batch_sums(prediction, targets, SEVERAL, hd95=True), SEVERAL)
    for k, name in enumerate(SEVERAL.masks):
        chosen = masks[:, k].any(-1).any(-1) & guess[:, k].any(-1).any(-1) & has_mask[:, k]
        assert 0 < chosen.sum() < has_mask[:, k].sum()
        metric = HausdorffDistanceMetric(include_background=True, percentile=95)
        metric(guess[chosen, k][:, None], masks[chosen, k][:, None])
        of_class = ours.mask_classes[name]
        assert of_class.hd95_images == chosen.sum()
        assert of_class.hd95 == pytest.approx(metric.aggregate().item())
    assert ours.hd95 == pytest.approx(np.mean([c.hd95 for c in ours.mask_classes.values()]))


def test_hd95_by_hand() -> None:
    actual, predicted = torch.zeros(2, 1, 12, 12), torch.zeros(2, 1, 12, 12)
    actual[0, 0, 2:5, 2:5] = 1
    predicted[0, 0, 2:5, 5:8] = 1  # three pixels to the right
    targets = Targets(actual, torch.ones(2, 1, dtype=torch.bool), torch.eye(2), torch.ones(2) > 0)
    sums = batch_sums(Prediction(predicted - 0.5, None), targets, TWO, hd95=True)
    assert sums.hd95.tolist() == [3.0]
    assert sums.hd95_images.tolist() == [1.0]  # the other image has empty masks
    nothing = batch_sums(Prediction(torch.zeros(2, 1, 12, 12), None), targets, TWO, hd95=True)
    assert compute(nothing, TWO).hd95 is None


def test_hd95_without_monai_names_the_extra(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "monai" else find(name)
    )
    one = torch.ones(1, 8, 8, dtype=torch.bool)
    with pytest.raises(DistanceError, match=r"pip install 'polyclinic\[metrics\]'"):
        hausdorff_95(one, one)


def test_app_import_does_not_load_monai() -> None:
    code = "import sys, apps, polyclinic.simulation.local.run; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@given(cut=st.integers(1, 59), kind=st.sampled_from(list(KINDS)))
@settings(max_examples=25, deadline=None)
def test_metric_sums_are_additive(cut: int, kind: str) -> None:
    classes = KINDS[kind]
    everything = random_batch(2, classes=classes)

    def sums(s: slice) -> MetricSums:
        return batch_sums(*part(*everything, s), classes)

    whole = sums(slice(None)).to_lists()
    added = (sums(slice(cut)) + sums(slice(cut, None))).to_lists()
    for name, values in whole.items():
        assert added[name] == pytest.approx(values), name


def test_hd95_sums_are_additive() -> None:
    targets = Targets(circles(0, 8, 3), torch.ones(8, 3) > 0, torch.zeros(8, 3), torch.ones(8) < 0)
    everything = Prediction(circles(1, 8, 3) - 0.5, torch.zeros(8, 3)), targets
    first, second, whole = (
        batch_sums(*part(*everything, s), SEVERAL, hd95=True)
        for s in (slice(3), slice(3, None), slice(None))
    )
    assert (first + second).hd95 == pytest.approx(whole.hd95)
    assert (first + second).hd95_images.tolist() == whole.hd95_images.tolist()


@pytest.mark.parametrize("classes", KINDS.values(), ids=KINDS)
def test_metric_sums_and_values_round_trip(classes: Classes) -> None:
    sums = batch_sums(*random_batch(3, classes=classes), classes, hd95=True)
    again = MetricSums.from_lists(sums.to_lists(), classes, SIZE)
    values = compute(sums, classes)
    assert compute(again, classes) == values
    assert Metrics.from_json(json.loads(json.dumps(asdict(values)))) == values


def test_metrics_file_without_classes_is_read() -> None:
    values = compute(batch_sums(*random_batch(3), THREE), THREE)
    later = ("hd95", "mask_classes", "image_classes")
    old = {name: value for name, value in asdict(values).items() if name not in later}
    again = Metrics.from_json(old)
    assert again.dice == values.dice
    assert again.mask_classes == {}


def test_undefined_metrics_are_none() -> None:
    for classes in (TWO, SEVERAL):
        nothing = compute(empty_sums(classes), classes)
        counts = ("images", "lesions", "labelled", "mask_classes", "image_classes")
        assert {v for k, v in vars(nothing).items() if k not in counts} == {None}
        assert set(nothing.mask_classes.values()) == {
            MaskClass(0, 0, None, None, None, None, None, 0)
        }
        assert set(nothing.image_classes.values()) == {ImageClass(0, 0, None, None, None)}
        assert nothing.value("score") is None
        assert nothing.brief() == "Dice -, balanced accuracy -, AUC - (n 0)"


def test_single_class_has_accuracy_but_no_balanced_accuracy() -> None:
    known = torch.ones(2, dtype=torch.bool)
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    targets = Targets(torch.zeros(2, 1, 4, 4), ~known[:, None], labels, known)
    one_class = compute(batch_sums(Prediction(None, torch.eye(2)), targets, TWO), TWO)
    assert one_class.dice is None
    assert one_class.accuracy == 0.5
    assert one_class.balanced_accuracy is None
    assert one_class.sensitivity is None
    assert one_class.specificity == 0.5
    assert one_class.auc is None


def test_means_skip_classes_absent_from_all_images() -> None:
    masks = torch.zeros(2, 3, 4, 4)
    masks[:, 0, :2] = 1
    logits = torch.full((2, 3, 4, 4), -1.0)
    logits[:, 0, :1] = 1  # half of x, nothing of y and z
    logits[0, 1, 0, 0] = 1  # one false-positive pixel of y
    has_mask = torch.tensor([[True, True, False], [True, True, False]])
    labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    scores = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    targets = Targets(masks, has_mask, labels, torch.tensor([True, True]))
    ours = compute(batch_sums(Prediction(logits, scores), targets, SEVERAL), SEVERAL)
    assert ours.mask_classes["x"].dice == pytest.approx(2 / 3)
    assert ours.mask_classes["y"] == MaskClass(2, 0, None, None, 0.0, 0.5, None, 0)
    assert ours.mask_classes["z"] == MaskClass(0, 0, None, None, None, None, None, 0)
    assert ours.dice == pytest.approx(2 / 3)
    assert ours.lesions == 2
    # a and c have no negatives, so only b has a balanced accuracy
    assert ours.image_classes["a"] == ImageClass(2, 0, 1.0, None, None)
    assert ours.image_classes["c"] == ImageClass(2, 0, 0.5, None, None)
    assert ours.balanced_accuracy == 1.0
    assert ours.accuracy == 0.5


@pytest.mark.parametrize("logit", [0.0, 1e-30, -1e-30, 1e-6, -1e-6, 30.0, -30.0])
def test_score_histogram_splits_at_the_decision_threshold(logit: float) -> None:
    one = Classes(("lesion",), ("a",), "a", multi_label=True)
    known = torch.tensor([True])
    targets = Targets(torch.zeros(1, 1, 4, 4), ~known[:, None], torch.ones(1, 1), known)
    prediction = Prediction(None, torch.tensor([[logit]]))
    sums = batch_sums(prediction, targets, one)
    assert sums.scores[0, 1, BINS // 2 :].sum() == (logit > 0)
    assert sums.exact_matches[0] == (logit > 0)
    assert compute(sums, one).sensitivity == float(logit > 0)


def test_mismatched_or_non_finite_predictions_are_refused() -> None:
    prediction, targets = random_batch(0, n=4, classes=EXCLUSIVE)
    masks, classes = prediction.mask_logits, prediction.class_logits
    wrong = [
        (Prediction(masks[:, :2], classes), r"mask logits: expected \(4, 3, 8, 8\) or \(4, 4"),
        (Prediction(masks[..., :4], classes), "mask logits: expected"),
        (Prediction(masks, classes[:, :2]), r"class logits: expected \(4, 3\)"),
        (Prediction(masks[:3], classes[:3]), "mask logits: expected"),
        (Prediction(masks * torch.nan, classes), "expected finite mask logits"),
        (Prediction(masks, classes / 0), "expected finite class logits"),
    ]
    for found, said in wrong:
        with pytest.raises(ValueError, match=said):
            batch_sums(found, targets, EXCLUSIVE)
    with pytest.raises(ValueError, match="expected targets of 1 mask and 3 image classes, got 3"):
        batch_sums(prediction, targets, THREE)


def test_score_averages_the_defined_metrics() -> None:
    prediction, targets = random_batch(4)
    both = compute(batch_sums(prediction, targets, THREE), THREE)
    assert both.value("score") == pytest.approx((both.dice + both.balanced_accuracy) / 2)
    assert both.value("balanced-accuracy") == both.balanced_accuracy
    masks_only = compute(
        batch_sums(Prediction(prediction.mask_logits, None), targets, THREE), THREE
    )
    assert masks_only.value("score") == masks_only.dice


def test_area_under_curve_by_hand() -> None:
    # one positive above, one equal to and one below the single negative
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
        ({"images": [1.0]}, "annotated: expected at most"),
        ({"lesions": [60.0]}, "lesions: expected at most"),
        ({"predicted": [1e9]}, "predicted: expected at most"),
        ({"actual": [1e9]}, "actual: expected at most"),
        ({"hd95_images": [60.0]}, "hd95_images: expected at most"),
        ({"hd95": [2.0 * math.hypot(*SIZE)], "hd95_images": [1.0]}, "hd95: expected at most"),
        ({"labelled": [61.0]}, "labelled: expected at most"),
        ({"exact_matches": [60.0]}, "exact_matches: expected at most"),
        ({"confusion": [1e3] * 9}, "confusion: expected at most"),
        ({"scores": [1.0] * (3 * 2 * BINS)}, "scores: expected at most"),
    ],
)
def test_impossible_sums_are_refused_by_name(change: dict, said: str) -> None:
    lists = batch_sums(*random_batch(5), THREE).to_lists()
    lists.update(change)
    lists = {name: values for name, values in lists.items() if values is not None}
    with pytest.raises(ValueError, match=said):
        MetricSums.from_lists(lists, THREE, SIZE)


def test_confusion_with_multi_label_classes_is_refused() -> None:
    lists = batch_sums(*random_batch(5, classes=SEVERAL), SEVERAL).to_lists()
    lists["confusion"][0] = 1.0
    with pytest.raises(ValueError, match="confusion: expected at most 0"):
        MetricSums.from_lists(lists, SEVERAL, SIZE)


@pytest.mark.parametrize("classes", [TWO, EXCLUSIVE, SEVERAL], ids=["one", "exclusive", "several"])
def test_empty_sums_have_the_documented_shapes(classes: Classes) -> None:
    """One number, one per mask class, or by image class; a wrong shape would be sent as it is."""
    single = {"images", "lesions", "labelled", "exact_matches"}
    k, masks = len(classes.images), len(classes.masks)
    for field in fields(MetricSums):
        wanted = (1,) if field.name in single else (masks,)
        wanted = {"confusion": (k, k), "scores": (k, 2, BINS)}.get(field.name, wanted)
        assert getattr(empty_sums(classes), field.name).shape == wanted, field.name
