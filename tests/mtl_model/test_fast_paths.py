"""Every optimised computation of the network matches the reference implementation.

Tolerances in float64, where rounding flips no ReLU: 1e-5 for outputs and 1e-4 of the largest
gradient. For the published sizes in fp32: 1e-4 of the largest logit. bf16 keeps 8 bits, so its
logits may differ by 0.05 of the largest.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor

from polyclinic.client.training.device import compiled
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.inference import InferenceForm
from polyclinic.mtl_model.network import MultiTaskUNet, build_model
from polyclinic.simulation.benchmarks.plain import reference_implementation
from tests.factories import losses_of, small, some_targets

SIZE = (64, 64)
# windows of 4 on maps of 32, 16, 8 and 4: three stages have shifted windows
VARIANTS = [
    {"window": 4},
    {"window": 4, "norm": "batch"},
    {"window": 4, "block_order": "parallel"},
    {"window": 4, "dfe": "sum", "upsample": "bilinear"},
    {"window": 4, "token_mixing": "published"},
    {"window": 2, "stride": 4},
]


def some_images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, *SIZE, generator=torch.Generator().manual_seed(0))


def livened(model: MultiTaskUNet) -> MultiTaskUNet:
    """Give position biases a noticeable size, since initial ones are tiny."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias.table"):
            torch.nn.init.normal_(parameter)
    return model


def gradients(model: MultiTaskUNet, images: Tensor) -> dict[str, Tensor]:
    model.train()
    losses_of(model, images, some_targets(len(images), SIZE)).sum().backward()
    return {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}


def side_by_side(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the gradients of split convolutions where the reference has a single one."""
    joined: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        whole = re.sub(r"\.parts\.\d+\.", ".conv.", name)
        if name not in plain and whole in joined:
            joined[whole] = torch.cat([joined[whole], tensor], dim=1)
        else:
            joined[name if name in plain else whole] = tensor
    assert set(joined) == set(plain)
    return joined


def equal_outputs(ours: MultiTaskUNet, plain: MultiTaskUNet, images: Tensor) -> None:
    with torch.no_grad():
        for found, expected in zip(ours.eval()(images)[:2], plain.eval()(images)[:2], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def equal_gradients(ours: MultiTaskUNet, plain: MultiTaskUNet, images: Tensor) -> None:
    expected = gradients(plain, images)
    for name, found in side_by_side(gradients(ours, images), expected).items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4 * largest + 1e-8)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_network_matches_the_reference_implementation(changes: dict[str, object]) -> None:
    ours = livened(small(**changes)).double()
    plain = reference_implementation(ours)
    equal_outputs(ours, plain, some_images().double())
    equal_gradients(ours, plain, some_images().double())


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_full_network_in_fp32_matches_the_reference(norm: str) -> None:
    config = ModelConfig(norm=norm)
    ours = build_model(config, size=(224, 224), in_channels=3, image_classes=3, seed=0)
    ours, plain = ours.eval(), reference_implementation(ours).eval()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(InferenceForm(ours)(image)[:2], plain(image)[:2], strict=True)
    for found, expected in pairs:
        largest = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * largest)


def test_comparison_detects_a_changed_bias() -> None:
    """Negative control of the comparison above."""
    ours = livened(small(window=4))
    plain = reference_implementation(ours)
    with torch.no_grad():
        plain.encoder.swins[0].blocks[1].attention.bias.table[0, 0] += 1
    with pytest.raises(AssertionError):
        equal_outputs(ours, plain, some_images())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_channels_last_matches_the_default_layout(changes: dict[str, object]) -> None:
    plain = livened(small(**changes)).double()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images = some_images().double()
    equal_outputs(last, plain, images.contiguous(memory_format=torch.channels_last))
    equal_gradients(last, plain, images.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_gradient_checkpointing_gives_equal_gradients(norm: str) -> None:
    kept = livened(small(window=4, drop_path=0.3, norm=norm)).double()
    again = copy.deepcopy(kept)
    again.set_grad_checkpointing(True)
    torch.manual_seed(5)
    expected = gradients(kept, some_images().double())
    torch.manual_seed(5)
    found = gradients(again, some_images().double())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    statistics = dict(kept.named_buffers())
    assert bool(statistics) == (norm == "batch")
    assert all(torch.equal(b, statistics[name]) for name, b in again.named_buffers())


@pytest.mark.parametrize("changes", VARIANTS[:2], ids=str)
def test_bf16_outputs_are_close_to_fp32(changes: dict[str, object]) -> None:
    model = livened(small(**changes)).eval()
    with torch.no_grad():
        plain = model(some_images())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(some_images())
        ready = InferenceForm(model, torch.bfloat16)(some_images())
    for found, expected in zip((*rounded[:2], *ready[:2]), (*plain[:2], *plain[:2]), strict=True):
        assert found.dtype == torch.bfloat16
        largest = expected.abs().max().item()
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * largest)


# one of each kind in tests/mtl_model/test_backbone.py
BACKBONES = (
    *("resnet34d", "resnet50", "efficientnet_lite0", "tf_efficientnet_lite0"),
    *("mobilenetv3_small_050", "regnety_002", "convnext_atto", "densenet121"),
)
FOLDED = [
    *VARIANTS,
    {"norm": "batch", "dfe": "sum"},
    # its norms follow sums of convolutions
    {"norm": "batch", "stride": 4, "backbone": "repvit_m0_9", "width": 0, "depths": ()},
    {"norm": "batch", "upsample": "bilinear", "block_order": "parallel"},
    *(
        pytest.param(
            {"norm": "batch", "backbone": name, "width": 0, "depths": ()},
            marks=(pytest.mark.long,) if name in ("resnet50", "densenet121") else (),  # a minute
        )
        for name in BACKBONES
    ),
]


@pytest.mark.parametrize("changes", FOLDED, ids=str)
def test_inference_form_matches_the_network(changes: dict[str, object]) -> None:
    plain = livened(small(**changes)).double()
    plain.train()(some_images(4).double())  # sets the running statistics
    ready = InferenceForm(plain, torch.float64)
    with torch.no_grad():
        expected = plain.eval()(some_images().double())
    for found, wanted in zip(ready(some_images())[:2], expected[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    left = [m for m in ready.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(left) < len([m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)]) or (
        changes.get("norm") != "batch"
    )


def test_inference_form_leaves_the_network_unchanged() -> None:
    model = small(norm="batch").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    InferenceForm(model, torch.bfloat16)(some_images())
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    losses_of(model, some_images(), some_targets(2, SIZE)).sum().backward()


@pytest.mark.long
@pytest.mark.timeout(900)  # the C++ compiler takes two minutes on two cores
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo reads it
def test_compiled_network_matches_in_training_and_evaluation() -> None:
    plain = livened(small(window=4, swin_depth=1, dfe="none")).double()
    ours = copy.deepcopy(plain)
    equal_outputs(compiled(ours), plain, some_images().double())
    for batch in (2, 3):  # the last batch of an epoch has another size
        equal_gradients(compiled(ours), plain, some_images(batch).double())
        for model in (ours, plain):
            model.zero_grad()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "batch", "swin_depth": 1, "dfe": "none"},
        *(pytest.param(changes, marks=pytest.mark.long) for changes in VARIANTS),
        *(
            pytest.param(
                {"backbone": name, "width": 0, "depths": "", "dfe": "none"}, marks=pytest.mark.long
            )
            for name in ("resnet50", "convnext_atto", "tf_efficientnet_lite0", "regnety_004")
        ),
    ],
    ids=str,
)
def test_torch_compile_builds_one_graph_and_counts_a_batch_once(
    changes: dict[str, object],
) -> None:
    """Uses all of torch.compile but the C++ compiler, with gradient checkpointing."""
    plain = livened(small(**{"swin_depth": 2, **changes})).double()
    ours = copy.deepcopy(plain)
    ours.set_grad_checkpointing(True)
    torch.compiler.reset()  # it caches only a few networks per process
    one_graph = torch.compile(ours, fullgraph=True, backend="aot_eager")
    equal_gradients(one_graph, plain, some_images().double())
    statistics = dict(plain.named_buffers())
    assert bool(statistics) == (changes.get("norm") == "batch")
    for name, found in ours.named_buffers():
        torch.testing.assert_close(found, statistics[name])
