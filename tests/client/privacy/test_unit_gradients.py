"""Clipped sums computed without per-unit gradients, against autograd and Opacus."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import polyclinic.client.privacy.unit_gradients
from polyclinic.client.privacy.unit_gradients import (
    _gradients,
    _squares_of_weight,
    units_of_network,
)
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.mtl_model.losses import Targets, multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.uncertainty import Uncertainty
from tests.factories import VARIANTS, small, some_targets, without_chance

SIZE = (64, 48)
CLIP = 0.5
UNITS = torch.tensor([0, 0, 1, 2])  # the unit of each of the four examples


def some_batch() -> tuple[Tensor, Targets]:
    images = torch.randn(4, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    return images, some_targets(4, SIZE)


def part(targets: Targets, of: slice | Tensor) -> Targets:
    return Targets(*(tensor[of] for tensor in targets))


def one_unit_at_a_time(
    model: MultiTaskUNet, images: Tensor, targets: Targets, loss: LossConfig, clip: float = CLIP
) -> list[Tensor]:
    """Compute the clipped sum by plain autograd, one unit at a time."""
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    for unit in UNITS.unique():
        mine = unit == UNITS
        value = multi_task_loss(model(images[mine]), part(targets, mine), loss).total.sum()
        gradient = torch.autograd.grad(value, parameters)
        norm = torch.stack([g.norm() for g in gradient]).norm()
        for total, g in zip(sums, gradient, strict=True):
            total += g * min(1.0, clip / (norm.item() + 1e-6))
    return sums


def clipped_sum(
    kind: str,
    model: MultiTaskUNet,
    images: Tensor,
    targets: Targets,
    loss: LossConfig,
    passes: Sequence[tuple[slice, list[int], bool]] = ((slice(0, 4), UNITS.tolist(), False),),
    clip: float = CLIP,
) -> list[Tensor]:
    parameters = list(model.parameters())
    sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in parameters}
    with units_of_network(kind, model, parameters) as units:
        for of, unit, alone in passes:
            prediction = units.forward(images[of])
            losses = multi_task_loss(prediction, part(targets, of), loss)
            units.backward(losses.total.sum(), torch.tensor(unit), alone)
            if not alone:
                units.clip(clip, sums)
        units.clip(clip, sums)
    return list(sums.values())


def close(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-3) -> None:
    scale = torch.stack([e.abs().max() for e in expected]).max().item()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=1e-4 * scale)


def compare(
    model: MultiTaskUNet, loss: LossConfig | None = None, kinds: Sequence[str] = ("ghost",)
) -> None:
    model.double().train()  # in float32, rounding over a batch can flip a ReLU
    loss = loss or LossConfig()
    images, targets = some_batch()
    images = images.double()
    expected = one_unit_at_a_time(model, images, targets, loss)
    for kind in kinds:
        close(clipped_sum(kind, model, images, targets, loss), expected)


@pytest.fixture
def ghosts_everywhere(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Force inner products (ghost norms) in every layer; returns the layer types that use them."""
    met: list[type] = []

    def enough(units, layer, _backprops, wanted) -> bool:
        found = units._calls[layer] == 1 and not units._unit_continues and layer.weight in wanted
        met.extend([type(layer)] if found else [])
        return found

    monkeypatch.setattr(
        polyclinic.client.privacy.unit_gradients.GhostUnits, "_norm_is_enough", enough
    )
    return met


@pytest.mark.parametrize("changes", without_chance(VARIANTS))
def test_clipped_sums_match_autograd_for_every_option(
    changes: dict[str, object],
) -> None:
    compare(small(**changes))


@pytest.mark.parametrize("changes", [{}, {"dfe": "sum", "upsample": "bilinear"}], ids=str)
def test_clipped_sums_match_with_ghost_norms_in_every_layer(
    changes: dict[str, object], ghosts_everywhere: list[type]
) -> None:
    compare(small(**changes))
    assert {nn.Conv2d, nn.Linear} <= set(ghosts_everywhere)


def test_clipped_sums_match_with_learned_task_weights() -> None:
    model = small()
    model.uncertainty = Uncertainty(1.0, 0.25)
    compare(model, LossConfig(weighting="uncertainty"))


def test_clipped_sums_match_with_channels_last(ghosts_everywhere: list[type]) -> None:
    compare(small().to(memory_format=torch.channels_last), kinds=("ghost", "hooks"))


def test_ghost_norms_are_chosen_for_large_layers() -> None:
    """Without this, the tests above would compare one method with itself."""
    model = small(width=128, size=(32, 32)).train()
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with units_of_network("ghost", model, list(model.parameters())) as units:
        losses = multi_task_loss(units.forward(images), some_targets(2, (32, 32)), LossConfig())
        units.backward(losses.total.sum(), torch.tensor([0, 1]))
        kept = sum(call.layer.weight.numel() for call, _ in units._kept)
    assert kept > sum(p.numel() for p in model.parameters()) / 2


@pytest.mark.parametrize("kind", ["ghost", "hooks"])
def test_unit_across_several_passes_is_clipped_once(kind: str) -> None:
    model, (images, targets) = small().train(), some_batch()
    together = clipped_sum(kind, model, images, targets, LossConfig())
    passes = [
        (slice(0, 1), [0], True),
        (slice(1, 2), [0], True),
        (slice(2, 4), [0, 1], False),
    ]
    # the first unit's two passes end at the clip before the third
    parameters = list(model.parameters())
    sums = {p: torch.zeros_like(p) for p in parameters}
    with units_of_network(kind, model, parameters) as units:
        for i, (of, unit, alone) in enumerate(passes):
            losses = multi_task_loss(units.forward(images[of]), part(targets, of), LossConfig())
            units.backward(losses.total.sum(), torch.tensor(unit), alone)
            if i > 0:
                units.clip(CLIP, sums)
    close(list(sums.values()), together)


def test_clip_norm_binds_and_large_norm_gives_plain_gradient() -> None:
    model, (images, targets) = small().train(), some_batch()
    loose = clipped_sum("ghost", model, images, targets, LossConfig(), clip=1e9)
    value = multi_task_loss(model(images), targets, LossConfig()).total.sum()
    close(loose, list(torch.autograd.grad(value, list(model.parameters()))))
    tight = clipped_sum("ghost", model, images, targets, LossConfig(), clip=1e-3)
    assert torch.stack([g.norm() for g in tight]).norm() <= 3 * 1e-3 * (1 + 1e-4)


def test_units_of_network_leaves_no_hooks_behind() -> None:
    model, (images, targets) = small().train(), some_batch()
    clipped_sum("ghost", model, images, targets, LossConfig())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_input_modified_in_place_is_refused() -> None:
    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            out = self.layer(x)
            x.add_(1)
            return out

    network = Spoils()
    with (
        units_of_network("ghost", network, list(network.parameters())) as units,
        pytest.raises(RuntimeError, match=r"Linear: its input was modified in place"),
    ):
        units.backward(units.forward(torch.randn(2, 3)).sum(), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(40, 50, 3, padding=1),
        nn.Conv2d(40, 50, 3, stride=2, dilation=2),
        nn.Linear(40, 50),
    ],
    ids=str,
)
def test_ghost_norms_are_never_below_exact_norms(layer: nn.Module) -> None:
    """This also holds where positions nearly cancel and only rounding remains."""
    torch.manual_seed(0)
    x = torch.randn(3, 40, 12, 12) if isinstance(layer, nn.Conv2d) else torch.randn(3, 144, 40)
    backprops = torch.randn_like(layer(x))
    constant = (
        torch.ones_like(x) * 3
    )  # so that only the sum of the backward signal over positions matters
    balanced = backprops - backprops.mean((2, 3) if x.dim() == 4 else 1, keepdim=True)
    for a, b in ((x, backprops), (constant, balanced)):
        for span in (slice(0, 1), slice(1, 3)):
            gradient = _gradients(layer, a[span], b[span], {layer.weight})[layer.weight]
            exact = gradient.double().square().sum().item()
            found = _squares_of_weight(layer, a[span], b[span], [slice(0, 3)]).item()
            assert found >= exact * (1 - 1e-6)
            if a is x:
                assert found == pytest.approx(exact, rel=1e-2)


def test_clipped_sum_in_bf16_stays_within_the_clip_norm() -> None:
    model, (images, targets) = small().train(), some_batch()
    sums = {p: torch.zeros_like(p) for p in model.parameters()}
    with units_of_network("ghost", model, list(sums)) as units:
        with torch.autocast("cpu", torch.bfloat16):
            prediction = units.forward(images[:1])
        losses = multi_task_loss(prediction, part(targets, slice(0, 1)), LossConfig())
        units.backward(losses.total.sum(), torch.tensor([0]))
        units.clip(1e-2, sums)
    norm = torch.stack([g.norm() for g in sums.values()]).norm().item()
    assert norm <= 1e-2 * (1 + 1e-4)
    assert norm > 0.99e-2
