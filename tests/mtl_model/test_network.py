"""The whole network: published sizes, independent examples, gradients and odd image sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.blocks import group_norm
from polyclinic.mtl_model.losses import Targets
from polyclinic.mtl_model.network import MultiTaskUNet, build_model
from polyclinic.simulation.benchmarks.plain import reference_implementation
from tests.factories import SMALL, VARIANTS, losses_of, small, some_targets


def published(dfe: str, side: int, masks: int, device: str) -> MultiTaskUNet:
    config = ModelConfig(norm="batch", dfe=dfe)
    shape = {"size": (side, side), "in_channels": 3, "image_classes": 3, "mask_channels": masks}
    with torch.device(device):
        return build_model(config, **shape)


@pytest.mark.parametrize(
    ("dfe", "side", "masks", "millions"),
    [
        ("concat", 224, 1, 56.35),
        ("sum", 224, 1, 44.16),
        ("none", 224, 1, 33.71),
        ("concat", 512, 4, 56.54),
    ],
)
def test_parameter_count_matches_the_publication(
    dfe: str, side: int, masks: int, millions: float
) -> None:
    count = sum(p.numel() for p in published(dfe, side, masks, "cpu").parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("dfe", "side", "masks", "gmacs"),
    [
        ("concat", 224, 1, 38.1),
        ("sum", 224, 1, 30.9),
        ("none", 224, 1, 24.7),
        ("concat", 512, 4, 225.0),
    ],
)
def test_operation_count_matches_the_publication(
    dfe: str, side: int, masks: int, gmacs: float
) -> None:
    model = published(dfe, side, masks, "meta").eval()
    with torch.device("meta"):
        image = torch.empty(1, 3, side, side)
        plainly, ours = operations(reference_implementation(model), image), operations(model, image)
    assert plainly / 1e9 == pytest.approx(gmacs, abs=0.05 if side == 224 else 0.5)
    assert 0.985 * plainly < ours < plainly  # ours skips token pairs that a mask would discard


def operations(model: nn.Module, image: Tensor) -> float:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(image)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("changes", [*VARIANTS, {"norm": "batch"}], ids=str)
def test_every_parameter_gets_a_gradient(changes: dict[str, object]) -> None:
    torch.manual_seed(3)  # fixes which paths are dropped
    model = small(**changes).train()
    generator = torch.Generator().manual_seed(0)
    losses_of(
        model, torch.randn(4, 1, 64, 64, generator=generator), some_targets(4)
    ).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not dead


def test_dilated_branches_get_gradients_on_small_maps() -> None:
    model = small().train()
    generator = torch.Generator().manual_seed(0)
    losses_of(
        model, torch.randn(4, 1, 64, 64, generator=generator), some_targets(4)
    ).sum().backward()
    for name, parameter in model.dfe.named_parameters():
        if "dilated" in name and parameter.dim() == 4:
            assert parameter.grad.abs().amax(dim=(0, 1)).min() > 0, name


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_examples_of_a_batch_are_independent(changes: dict[str, object]) -> None:
    model = small(**changes).eval()
    images = torch.randn(
        3, 1, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    prediction = model(images)
    (prediction.mask_logits[1].sum() + prediction.class_logits[1].sum()).backward()
    seen = images.grad.abs().sum(dim=(1, 2, 3))
    assert seen[1] > 0
    assert seen[0] == seen[2] == 0


def test_batch_norm_makes_examples_dependent() -> None:
    """Negative control of the test above."""
    model = small(norm="batch").train()
    images = torch.randn(3, 1, 64, 64, requires_grad=True)
    prediction = model(images)
    (prediction.mask_logits[1].sum() + prediction.class_logits[1].sum()).backward()
    assert images.grad[0].abs().sum() > 0


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameterised_layer_has_the_batch_dimension_first(
    changes: dict[str, object],
) -> None:
    model = small(**changes).eval()
    batch, wrong, seen = 5, [], set()

    def look(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.add(name)
            if any(t.shape[0] != batch for t in (inputs[-1], output)):
                wrong.append(name)

        return hook

    owners = [
        name
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    for name in owners:
        model.get_submodule(name).register_forward_hook(look(name))
    model(torch.randn(batch, 1, 64, 64))
    assert not wrong
    assert seen == set(owners)


@pytest.mark.parametrize("changes", [{}, {"stride": 4}, {"token_mixing": "published"}], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (50, 77), (33, 129)])
def test_outputs_have_the_input_size_for_any_size(
    size: tuple[int, int], changes: dict[str, object]
) -> None:
    model = small(**changes).eval()
    h, w = size
    images = torch.randn(2, 1, h, w)
    with torch.no_grad():
        ours = model(images)
        stride = model.encoder.stride
        whole = model(nn.functional.pad(images, (0, -w % stride, 0, -h % stride)))
    assert ours.mask_logits.shape == (2, 1, h, w)
    assert torch.equal(ours.mask_logits, whole.mask_logits[..., :h, :w])
    assert torch.equal(ours.class_logits, whole.class_logits)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_build_model_sets_input_channels_and_classes(channels: int) -> None:
    model = build_model(
        ModelConfig(**SMALL), size=(32, 32), in_channels=channels, image_classes=5, mask_channels=3
    )
    prediction = model(torch.randn(2, channels, 32, 32))
    assert prediction.mask_logits.shape == (2, 3, 32, 32)
    assert prediction.class_logits.shape == (2, 5)


def test_unrequested_task_is_not_computed() -> None:
    model = small().eval()
    images = torch.randn(2, 1, 64, 64)
    both = model(images)
    classes = model(images, ("classification",))
    masks = model(images, ("segmentation",))
    assert classes.mask_logits is None
    assert masks.class_logits is None
    torch.testing.assert_close(classes.class_logits, both.class_logits)
    torch.testing.assert_close(masks.mask_logits, both.mask_logits)


def test_seeded_build_is_deterministic_and_keeps_global_random_state() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = small().state_dict(), small().state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_state_dict_contains_only_parameters() -> None:
    model = small()
    assert set(model.state_dict()) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_network_overfits_four_examples(norm: str) -> None:
    torch.manual_seed(0)
    model = small(norm=norm, size=(32, 32)).train()
    masks = torch.zeros(4, 1, 32, 32)
    masks[:, :, 8:24, 8:24] = 1
    masks[1:3, :, 8:16] = 0
    images = 2 * masks + 0.5 * torch.randn(4, 1, 32, 32)
    known = torch.ones(4, dtype=torch.bool)
    targets = Targets(masks, known[:, None], torch.eye(2)[[0, 1, 1, 0]], known)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = last = None
    for _ in range(40):
        loss = losses_of(model, images, targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.6 * first
    assert model(images).class_logits.argmax(1).tolist() == [0, 1, 1, 0]


def test_load_state_dict_makes_networks_equal() -> None:
    ours, other = small().eval(), small(dfe="concat").eval()
    torch.nn.init.normal_(other.head.out.weight)
    images = torch.randn(2, 1, 64, 64)
    assert not torch.equal(ours(images).class_logits, other(images).class_logits)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images).class_logits, other(images).class_logits)
    assert torch.equal(ours(images).mask_logits, other(images).mask_logits)


def test_published_token_mixing_shares_parameters_but_differs() -> None:
    proper, published = small().eval(), small(token_mixing="published").eval()
    published.load_state_dict(proper.state_dict())
    images = torch.randn(2, 1, 64, 64)
    assert not torch.allclose(proper(images).mask_logits, published(images).mask_logits)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(8, 1), (16, 1), (32, 2), (48, 1), (112, 1), (320, 4), (512, 32), (2048, 32)],
)
def test_group_norm_has_at_least_sixteen_channels_per_group(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert norm.num_groups == groups
    norm(torch.randn(2, channels, 3, 3))
