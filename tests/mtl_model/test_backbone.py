"""timm models with four stages as the convolutional path."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from polyclinic.mtl_model.backbone import BackboneError, ConvPath, build_conv_path
from polyclinic.mtl_model.blocks import group_norm

NAMES = [
    "resnet18",
    "resnet34d",
    "resnet50",
    "seresnet50",
    "regnety_004",
    "convnext_atto",
    "efficientnet_lite0",
    "tf_efficientnet_b0",
    "mobilenetv3_small_050",
    "densenet121",
]


def maps_of(path: ConvPath, image: torch.Tensor) -> list[torch.Tensor]:
    x = path.stem(image)
    return [x := stage(x) for stage in path.stages]


@pytest.mark.parametrize("name", NAMES)
def test_staged_backbone_matches_timm_features(name: str) -> None:
    torch.manual_seed(0)
    weights = timm.create_model(name).state_dict()
    path = build_conv_path(name, 3, 4, None, weights=weights).eval()
    features = timm.create_model(name, features_only=True).eval()
    flat = {key.replace(".", "_"): tensor for key, tensor in weights.items()}
    features.load_state_dict({key: flat[key.replace(".", "_")] for key in features.state_dict()})
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs = {m.shape[-1]: m for m in features(image)}
        ours = maps_of(path, image)
    assert [m.shape[-1] for m in ours] == [24, 12, 6, 3]
    assert [m.shape[1] for m in ours] == list(path.channels)
    for found in ours:
        torch.testing.assert_close(found, theirs[found.shape[-1]], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_stem_with_stride_2_doubles_map_sides(name: str) -> None:
    path = build_conv_path(name, 1, 2, group_norm).eval()
    with torch.no_grad():
        sides = [m.shape[-2:] for m in maps_of(path, torch.randn(1, 1, 32, 64))]
    assert sides == [(16, 32), (8, 16), (4, 8), (2, 4)]


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "regnety_004"])
def test_group_norms_inherit_scale_and_shift_of_batch_norms(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.bias)
    weights = model.state_dict()
    batch = build_conv_path(name, 3, 4, None, weights=weights)
    group = build_conv_path(name, 3, 4, group_norm, weights=weights)
    assert not [m for m in group.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m for m in batch.modules() if isinstance(m, nn.BatchNorm2d)]
    after = [m for m in group.modules() if isinstance(m, nn.GroupNorm)]
    assert before
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.weight, new.weight)
        assert torch.equal(old.bias, new.bias)
    activations = [type(m) for m in batch.modules() if "activation" in type(m).__module__]
    assert activations == [type(m) for m in group.modules() if "activation" in type(m).__module__]


def test_resnet_width_and_depths_are_configurable() -> None:
    path = build_conv_path("resnet18", 1, 2, group_norm, width=16, depths=(1, 2, 1, 1))
    assert path.channels == (16, 32, 64, 128)
    assert [len(stage[0]) for stage in path.stages] == [1, 2, 1, 1]


def test_backbone_has_no_inplace_modules() -> None:
    for name in NAMES:
        path = build_conv_path(name, 1, 2, group_norm)
        assert not [m for m in path.modules() if getattr(m, "inplace", False)], name


@pytest.mark.parametrize(
    ("name", "stride", "said"),
    [
        ("resnet35", 2, "timm has no model 'resnet35'; did you mean resnet"),
        ("vit_tiny_patch16_224", 2, "got maps at 1/16"),
        ("xception41", 2, "got stages that are not consecutive modules"),
        ("inception_v3", 4, "image of 64 pixels"),
        ("swin_tiny_patch4_window7_224", 4, "image of 64 pixels"),
        ("vgg11", 2, "a stem without a strided convolution"),
        ("selecsls42", 4, "a stage that returns a list of maps"),
    ],
)
def test_model_without_suitable_stages_is_refused(name: str, stride: int, said: str) -> None:
    with pytest.raises(BackboneError, match=said):
        build_conv_path(name, 3, stride, None)


def test_irreplaceable_batch_norm_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"got BatchNorm1d .* mix the images of a batch"):
        build_conv_path("nextvit_small", 3, 4, group_norm)


@pytest.mark.parametrize("name", ["resnet18", "resnet50_gn", "nfnet_l0"])
def test_every_parameter_has_a_gradient_at_initialisation(name: str) -> None:
    path = build_conv_path(name, 1, 4, group_norm)
    maps_of(path, torch.randn(1, 1, 64, 64))[-1].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in path.parameters())


def test_width_change_with_a_deep_stem_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"single convolution as its stem.*resnet34d"):
        build_conv_path("resnet34d", 3, 2, None, width=32)


def test_width_change_of_a_non_resnet_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"expected a ResNet.*got convnext_atto"):
        build_conv_path("convnext_atto", 3, 2, None, width=32)
