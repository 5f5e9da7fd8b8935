"""A local training round: schedule, seeds, missing annotations, precision, compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.fx import GraphModule

from polyclinic.client.data.dataset import Examples
from polyclinic.client.training.device import DeviceError, compiled, dtype_of, find_device
from polyclinic.client.training.evaluate import EvaluationError, evaluate
from polyclinic.client.training.local_round import (
    Round,
    TrainingError,
    class_weights_of,
    learning_rate,
    train_one_round,
)
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.metrics import compute
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.sums import Classes
from polyclinic.mtl_model.tasks import TASKS
from tests.factories import CPU, DATA, changed_parts, same, small, some


def trained(
    examples: Examples, number: int = 1, site: str = "a", seed: int = 0, **train: object
) -> tuple[MultiTaskUNet, object]:
    model = small(size=(32, 32))
    result = train_one_round(
        model,
        examples,
        Round(number, 2, seed, site),
        data=DATA,
        train=TrainConfig(batch_size=4, **train),
        loss=LossConfig(),
        device=CPU,
    )
    return model, result


def test_round_trains_every_part_and_reports_losses() -> None:
    model, result = trained(some())
    assert changed_parts(model) == {"encoder", "dfe", "decoder", "head"}
    assert result.steps == 3
    assert 0 < result.loss_segmentation < 3
    assert 0 < result.loss_classification < 3


def test_weights_depend_on_seed_site_and_round_only() -> None:
    examples = some()
    first, _ = trained(examples)
    assert same(first, trained(examples)[0])
    assert not same(first, trained(examples, seed=1)[0])
    assert not same(first, trained(examples, site="b")[0])
    assert not same(first, trained(examples, number=2)[0])


def test_segmentation_part_without_masks_stays_unchanged() -> None:
    model, result = trained(some(masks=False))
    assert changed_parts(model) == {"encoder", "head"}
    assert result.loss_segmentation is None


def test_classification_head_without_labels_stays_unchanged() -> None:
    model, result = trained(some(labels=False))
    assert changed_parts(model) == {"encoder", "dfe", "decoder"}
    assert result.loss_classification is None


def test_training_without_annotations_is_refused() -> None:
    with pytest.raises(TrainingError, match="none of 12 training examples has a mask or a label"):
        trained(some(masks=False, labels=False))


def test_non_finite_loss_ends_the_round_with_reason() -> None:
    with pytest.raises(TrainingError, match="round 1: loss not finite"):
        trained(some(), learning_rate=1e30, clip_norm=0.0, augment=False)


def test_learning_rate_decays_over_the_whole_run() -> None:
    train = TrainConfig(learning_rate=1.0, poly_power=1.0)
    rates = [
        learning_rate(train, Round(number, 4, 0, "a"), step, 5)
        for number in range(1, 5)
        for step in range(5)
    ]
    assert rates == pytest.approx([1 - i / 20 for i in range(20)])


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"batch_size": 8}, 3),
        ({"batch_size": 8, "local_epochs": 2}, 6),
        ({"batch_size": 8, "local_steps": 5}, 5),
        ({"batch_size": 100}, 1),
    ],
)
def test_steps_follow_from_epochs_or_are_given(train: dict[str, int], steps: int) -> None:
    assert TrainConfig(**train).steps(20) == steps


def test_local_steps_beyond_one_epoch_repeat_examples() -> None:
    assert trained(some(), local_steps=5)[1].steps == 5


def test_class_weights_come_from_labels_or_from_config() -> None:
    examples = some(9)  # 5 of class 0, 4 of class 1
    balanced = class_weights_of(examples, DATA, LossConfig())
    assert balanced.tolist() == pytest.approx([9 / 10, 9 / 8])
    given = class_weights_of(examples, DATA, LossConfig(class_weights="1,2.5"))
    assert given.tolist() == [1.0, 2.5]
    none = class_weights_of(examples, DATA, LossConfig(class_weights="none"))
    assert none.tolist() == [1.0, 1.0]


def test_bfloat16_on_cpu_trains_close_to_full_precision() -> None:
    full, half = trained(some()), trained(some(), precision="bf16")
    assert half[1].loss_segmentation == pytest.approx(full[1].loss_segmentation, rel=0.05)
    assert half[0].state_dict()["head.out.weight"].dtype == torch.float32


def test_evaluation_counts_each_image_once_per_annotated_task() -> None:
    model, _ = trained(some())

    def metrics(examples: Examples):
        sums = evaluate(model, examples, data=DATA, batch_size=5, precision="fp32", device=CPU)
        return compute(sums, Classes.of(DATA))

    both = metrics(some())
    assert (both.images, both.lesions, both.labelled) == (12, 12, 12)
    no_masks = metrics(some(masks=False))
    assert no_masks.dice is None
    assert no_masks.accuracy == both.accuracy
    assert metrics(some(0)).images == 0


def test_training_after_evaluation_works() -> None:
    """The first message may be an evaluation, which changes the memory layout."""
    model = small(size=(32, 32))
    evaluate(model, some(), data=DATA, batch_size=5, precision="fp32", device=CPU)
    result = train_one_round(
        model,
        some(),
        Round(1, 2, 0, "a"),
        data=DATA,
        train=TrainConfig(batch_size=4),
        loss=LossConfig(),
        device=CPU,
    )
    assert result.steps == 3


def test_non_finite_model_output_is_refused() -> None:
    model = small(size=(32, 32))
    torch.nn.init.constant_(model.head.out.bias, float("nan"))
    with pytest.raises(EvaluationError, match="output is not finite"):
        evaluate(model, some(), data=DATA, batch_size=5, precision="fp32", device=CPU)


def test_missing_gpu_is_refused() -> None:
    assert find_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"train.device: got 'cuda:99', but PyTorch sees"):
        find_device("cuda:99")


def test_gradient_checkpointing_trains_the_same_weights() -> None:
    def trained(again: bool) -> dict[str, torch.Tensor]:
        model = small(size=(32, 32), drop_path=0.2)
        train_one_round(
            model,
            some(),
            Round(1, 2, 0, "a"),
            data=DATA,
            train=TrainConfig(batch_size=4, grad_checkpointing=again),
            loss=LossConfig(),
            device=CPU,
        )
        return model.state_dict()

    kept, again = trained(False), trained(True)
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())


def test_compile_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DeviceError, match=r"train.compile: expected a C\+\+ compiler \(no-such"):
        compiled(small(size=(32, 32)))


def test_compile_builds_few_graphs_for_all_tasks_and_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sites that share a process may have images of different sizes.

    Uses all of torch.compile but the C++ compiler, which fails on symbolic sizes.
    """
    symbols = []  # number of symbolic sizes of each graph

    def backend(graph: GraphModule, inputs: list[object]) -> Callable[..., object]:
        symbols.append(sum(isinstance(x, torch.SymInt) for x in inputs))
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    for side in (64, 32):
        for tasks in (TASKS, TASKS[:1], TASKS[1:]):
            for batch in (4, 3, 2, 1):
                model = small(size=(side, side), dfe="none", swin_depth=0)
                prediction = compiled(model)(torch.rand(batch, 1, side, side), tasks)
                assert (prediction.mask_logits is not None) == ("segmentation" in tasks)
                assert (prediction.class_logits is not None) == ("classification" in tasks)
    assert set(symbols) == {0, 1}  # at most the number of examples is symbolic
    assert len(symbols) <= 2 * 3 * 3  # per size: the first batch size, any other, and 1


@pytest.mark.parametrize(
    ("precision", "device", "has_it", "expected"),
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        (
            "auto",
            "cuda",
            False,
            torch.float32,
        ),  # a GPU that only emulates bfloat16, slower than float32
        ("fp32", "cuda", True, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
    ],
)
def test_auto_precision_uses_bfloat16_only_with_native_support(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, has_it: bool, expected: object
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or has_it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert dtype_of(precision, torch.device(device)) == expected


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # Dynamo reads .grad of a view
@pytest.mark.parametrize("again", [False, True])
def test_compiled_round_trains_nearly_the_same_weights(again: bool) -> None:
    def trained(compile: bool) -> dict[str, torch.Tensor]:
        model = small(size=(32, 32), dfe="none", swin_depth=1)
        train_one_round(
            model,
            some(),
            Round(1, 2, 0, "a"),
            data=DATA,
            train=TrainConfig(batch_size=5, grad_checkpointing=again, compile=compile),
            loss=LossConfig(),
            device=CPU,
        )
        return model.state_dict()

    plain, compiled_ = trained(False), trained(True)
    for name, tensor in plain.items():  # Adam's first steps have the size of the learning rate
        torch.testing.assert_close(compiled_[name], tensor, rtol=1e-3, atol=2e-4)
