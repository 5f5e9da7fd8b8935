"""Opacus's per-example gradients against autograd on one example at a time.

Differential privacy clips each example's gradient. A rule that mixes gradients of different
examples would break the guarantee, and no other test would show it.
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

SIZE = (64, 48)  # not square, so that there are both tall and wide windows


def loss_of(model: nn.Module, images: Tensor, targets: Targets, loss: LossConfig) -> Tensor:
    return multi_task_loss(model(images), targets, loss).total.sum()


def one_at_a_time(
    model: MultiTaskUNet, images: Tensor, targets: Targets, loss: LossConfig
) -> dict[str, Tensor]:
    """Compute gradients of every parameter by autograd, (B, ...) each."""
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
    model.double().train()  # in float32, rounding over a batch can flip a ReLU
    loss = loss or LossConfig()
    images = torch.randn(3, 1, *SIZE, generator=torch.Generator().manual_seed(0)).double()
    targets = targets or some_targets(3, SIZE)
    expected = one_at_a_time(model, images, targets, loss)
    hooked = GradSampleModule(model, loss_reduction="sum")
    loss_of(hooked, images, targets, loss).backward()
    for name, parameter in model.named_parameters():
        found = parameter.grad_sample
        assert found.shape == expected[name].shape, name
        tolerance = (
            1e-9 + 1e-6 * expected[name].abs().max().item()
        )  # all gradients of ConvNeXt can be tiny
        torch.testing.assert_close(
            found, expected[name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing:UserWarning"
)  # the images need no gradient
@pytest.mark.parametrize("changes", without_chance(VARIANTS))
def test_per_example_gradients_match_autograd_for_every_option(changes: dict[str, object]) -> None:
    compare(small(**changes))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_per_example_gradients_match_with_learned_task_weights() -> None:
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
def test_per_example_gradients_match_with_partial_annotations(maps: int, loss: LossConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(4, (3, *SIZE), generator=generator)
    masks = nn.functional.one_hot(index, 4).movedim(3, 1)[:, 1:].double()
    some = torch.tensor([[True] * 3, [True, maps == 4, maps == 4], [False] * 3])
    labels = torch.eye(2)[[0, 1, 1]].double()
    targets = Targets(masks, some, labels, torch.tensor([True, False, True]))
    compare(small(mask_maps=maps), loss, targets)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_per_example_gradients_match_with_channels_last() -> None:
    compare(small().to(memory_format=torch.channels_last))


def test_opacus_convolution_rule_is_wrong_for_channels_last() -> None:
    """Negative control. When it fails, Opacus has fixed its rule and ours can be removed."""
    conv = nn.Conv2d(4, 2, kernel_size=3, padding=1)
    x = torch.randn(2, 4, 6, 6)
    out = torch.randn(2, 2, 6, 6)
    exact_matches = compute_conv_grad_sample(conv, [x], out)[conv.weight]
    x = x.contiguous(memory_format=torch.channels_last)
    theirs = compute_conv_grad_sample(conv, [x], out)[conv.weight]
    ours = polyclinic.client.privacy.grad_samplers.convolution(conv, [x], out)[conv.weight]
    assert not torch.allclose(theirs, exact_matches, atol=1e-2)
    torch.testing.assert_close(ours, exact_matches)
