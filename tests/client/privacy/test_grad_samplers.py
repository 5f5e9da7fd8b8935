"""Gradients that Opacus takes apart by example, against those of one example at a time.

What differential privacy clips is an example's own gradient; a rule that mixes them up would
bound nothing, and nothing else would show it.
"""

from __future__ import annotations

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import Tensor, nn

import polyclinic.client.privacy.grad_samplers
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.mtl_model.losses import Targets, multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.uncertainty import Uncertainty
from tests.factories import VARIANTS, small, some_targets, without_chance

SIZE = (64, 48)  # not square: windows that are high and windows that are wide


def loss_of(model: nn.Module, images: Tensor, targets: Targets, loss: LossConfig) -> Tensor:
    return multi_task_loss(model(images), targets, loss).total.sum()


def one_at_a_time(
    model: MultiTaskUNet, images: Tensor, targets: Targets, loss: LossConfig
) -> dict[str, Tensor]:
    """(B, ...) gradients of every parameter."""
    rows = []
    for i in range(len(images)):
        one = Targets(*(part[i : i + 1] for part in targets))
        value = loss_of(model, images[i : i + 1], one, loss)
        rows.append(torch.autograd.grad(value, list(model.parameters())))
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, (torch.stack(g) for g in zip(*rows, strict=True)), strict=True))


def compare(
    model: MultiTaskUNet, loss: LossConfig | None = None, targets: Targets | None = None
) -> None:
    model.double().train()  # in float32 a batch's rounding flips a ReLU here and there
    loss = loss or LossConfig()
    images = torch.randn(3, 1, *SIZE, generator=torch.Generator().manual_seed(0)).double()
    targets = targets or some_targets(3, SIZE)
    expected = one_at_a_time(model, images, targets, loss)
    hooked = GradSampleModule(model, loss_reduction="sum")
    loss_of(hooked, images, targets, loss).backward()
    for name, parameter in model.named_parameters():
        found = parameter.grad_sample
        assert found.shape == expected[name].shape, name
        tolerance = 1e-9 + 1e-6 * expected[name].abs().max().item()  # ConvNeXt's can all be tiny
        torch.testing.assert_close(
            found, expected[name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # at the images
@pytest.mark.parametrize("changes", without_chance(VARIANTS))
def test_every_options_gradients_are_told_apart_by_example(changes: dict[str, object]) -> None:
    compare(small(**changes))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_so_are_those_of_learned_task_weights() -> None:
    model = small()
    model.uncertainty = Uncertainty(1.0, 0.25)
    compare(model, LossConfig(weighting="uncertainty"))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(
    ("maps", "loss"),
    [
        (4, LossConfig(segmentation="dice+focal", label_smoothing=0.1)),  # a softmax
        (3, LossConfig(segmentation="dice+ce", classification="soft-margin")),
    ],
    ids=["exclusive", "overlapping"],
)
def test_so_are_those_of_other_losses_where_not_all_is_annotated(
    maps: int, loss: LossConfig
) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(4, (3, *SIZE), generator=generator)
    masks = nn.functional.one_hot(index, 4).movedim(3, 1)[:, 1:].double()
    some = torch.tensor([[True] * 3, [True, maps == 4, maps == 4], [False] * 3])
    labels = torch.eye(2)[[0, 1, 1]].double()
    targets = Targets(masks, some, labels, torch.tensor([True, False, True]))
    compare(small(mask_maps=maps), loss, targets)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_channels_last_changes_nothing() -> None:
    compare(small().to(memory_format=torch.channels_last))


def test_the_rule_that_ours_replaces_is_wrong_for_channels_last() -> None:
    """The negative control; when it fails, Opacus has mended its rule and ours can go."""
    conv = nn.Conv2d(4, 2, kernel_size=3, padding=1)
    x = torch.randn(2, 4, 6, 6)
    out = torch.randn(2, 2, 6, 6)
    exact_matches = compute_conv_grad_sample(conv, [x], out)[conv.weight]
    x = x.contiguous(memory_format=torch.channels_last)
    theirs = compute_conv_grad_sample(conv, [x], out)[conv.weight]
    ours = polyclinic.client.privacy.grad_samplers.convolution(conv, [x], out)[conv.weight]
    assert not torch.allclose(theirs, exact_matches, atol=1e-2)
    torch.testing.assert_close(ours, exact_matches)
