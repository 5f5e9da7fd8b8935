"""The convolutional path: a timm model cut into a stem and four stages.

Widths and strides are read from timm (``feature_info``), so any timm model with feature maps at
1/4, 1/8, 1/16 and 1/32 of the image side is supported. Halving the stem's stride moves the maps to
1/2 ... 1/16, as in the published network.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyclinic.mtl_model.backbone_layers import (
    fix_padding,
    halve_stride,
    keep_outputs,
    replace_batch_norms,
    reset_zero_init,
)
from polyclinic.mtl_model.blocks import NormLayer, recomputed

STAGES = 4
RECOMPUTED_STAGES = 3  # the shallow stages: large activations that are cheap to recompute
_STRIDES = (4, 8, 16, 32)  # image side over map side of the four maps of an unmodified timm model
_PROBE = 64  # side of the test image that a cut model is run on, in pixels


class BackboneError(ValueError):
    """A timm model cannot be used as the network's convolutional path. The message says why."""


class ConvPath(nn.Module):
    """The stem and the four stages of a timm model, called one by one.

    Args:
        stem: the layers before the first stage.
        stages: the four stages, shallow to deep.
        channels: channels of each stage's output.
        stride: image side divided by the side of the first stage's output.
        stem_fits: True if the stem's output has the same shape as the first stage's output.

    Shapes:
        stem in:       (B, in_channels, H, W)
        stages[k] out: (B, channels[k], H / (stride * 2^k), W / (stride * 2^k))
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        channels: Sequence[int],
        stride: int,
        stem_fits: bool,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(channels)
        self.stride = stride
        self.stem_fits = stem_fits
        self.grad_checkpointing = False

    def stemmed(self, image: Tensor) -> Tensor:
        return recomputed(self.stem, image) if self.grad_checkpointing else self.stem(image)

    def forward_stage(self, k: int, x: Tensor) -> Tensor:
        """Run stage k (from 0); with gradient checkpointing, large activations are recomputed."""
        again = self.grad_checkpointing and k < RECOMPUTED_STAGES
        return recomputed(self.stages[k], x) if again else self.stages[k](x)


def build_conv_path(
    name: str,
    in_channels: int,
    stride: int,
    norm: NormLayer | None,
    width: int = 0,
    depths: tuple[int, ...] = (),
    weights: Mapping[str, Tensor] | None = None,
) -> ConvPath:
    """Build a timm model and cut it into a stem and four stages.

    Args:
        name: name of the timm model.
        in_channels: channels of the image.
        stride: 4 for the model's own strides, 2 to halve the stride of the stem.
        norm: factory of the layers that replace batch norms; they keep the scale and shift. None
            keeps the batch norms. Other norms, such as ConvNeXt's layer norms, are not replaced.
        width: channels of the first stage, doubled at each further stage; 0 for the model's own.
        depths: blocks per stage; empty for the model's own.
        weights: state dict of the timm model; None for random weights.

    Raises:
        BackboneError: if timm has no such model, the model does not have the expected stages, or
            ``width`` or ``depths`` is given for a model that is not a ResNet.
    """
    model = timm_model(name, in_channels, width, depths)
    if weights is None:
        reset_zero_init(model)
    else:
        model.load_state_dict(weights)
    stem, *stages = parts = _cut(model, name)
    if stride < _STRIDES[0] and not halve_stride(stem):
        raise _unusable(name, "a stem without a strided convolution")
    for part in parts:
        if norm is not None:
            replace_batch_norms(part, norm)
            _refuse_other_batch_norms(part, name)
        keep_outputs(part)
        fix_padding(part)
    shapes = _tried(parts, in_channels, stride, name)
    channels = tuple(shape[0] for shape in shapes[1:])
    return ConvPath(stem, stages, channels, stride, stem_fits=shapes[0] == shapes[1])


@torch.no_grad()
def _tried(
    parts: Sequence[nn.Module], in_channels: int, stride: int, name: str
) -> list[tuple[int, ...]]:
    """Return (C, H, W) of the outputs of the stem and the stages for a blank test image.

    Raises:
        BackboneError: if an output does not have the expected size.
    """
    x = torch.zeros(1, in_channels, _PROBE, _PROBE)
    shapes = []
    for part in parts:
        try:
            x = part.eval()(x)
        except (AssertionError, RuntimeError) as error:  # unsupported input sizes
            raise _unusable(name, f"{error} for an image of {_PROBE} pixels") from None
        if not isinstance(x, Tensor):
            raise _unusable(name, f"a stage that returns a {type(x).__name__} of maps")
        part.train()
        shapes.append(tuple(x.shape[1:]))
    sides = [_PROBE // (stride * 2**k) for k in range(STAGES)]
    if [shape[1:] for shape in shapes[1:]] != [(side, side) for side in sides]:
        raise _unusable(name, f"(C, H, W) of {shapes[1:]} for an image of {_PROBE} pixels")
    return shapes


def timm_model(
    name: str, in_channels: int, width: int = 0, depths: tuple[int, ...] = ()
) -> nn.Module:
    """Create a timm model with random weights.

    Args:
        name: name of the timm model.
        in_channels: channels of the image.
        width: see ``build_conv_path``.
        depths: see ``build_conv_path``.

    Raises:
        BackboneError: if there is no such model, or ``width`` or ``depths`` is given for a model
            that does not support it.
    """
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise BackboneError(
            f"model.backbone: timm has no model {name!r}"
            + (f"; did you mean {near}?" if near else "")
        )
    shape: dict[str, Any] = {"layers": depths} if depths else {}
    if (width or depths) and timm.model_entrypoint(name).__module__ != ResNet.__module__:
        raise BackboneError(
            f"model.width and model.depths: expected a ResNet, the only kind of backbone with "
            f"adjustable sizes, got {name}"
        )
    known = timm.get_pretrained_cfg(name)
    if width and known is not None and known.first_conv != "conv1":
        raise BackboneError(
            f"model.width: expected a ResNet with a single convolution as its stem, such as "
            f"resnet34, got {name}"
        )
    if width:
        # timm fixes a plain stem to 64 channels; only a deep stem has an adjustable width. The
        # model is therefore created with a deep stem, which a plain convolution then replaces.
        shape |= {
            "channels": tuple(width * 2**k for k in range(STAGES)),
            "stem_type": "deep",
            "stem_width": width // 2,
        }
    model: nn.Module = timm.create_model(name, pretrained=False, in_chans=in_channels, **shape)
    if width:
        conv = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.conv1 = conv
    return model


def names_of_path(model: nn.Module, name: str) -> list[str]:
    """List the state-dict entries of a timm model that belong to its stem and stages.

    Raises:
        BackboneError: if the model does not have the expected stages.
    """
    units = [unit for part in _units(model, name) for unit in part]
    return [n for n in model.state_dict() if any(n.startswith(f"{unit}.") for unit in units)]


def _cut(model: nn.Module, name: str) -> list[nn.Sequential]:
    """Split a model into its stem and four stages, each a sequence of the model's own modules."""
    return [
        nn.Sequential(OrderedDict((n.replace(".", "_"), model.get_submodule(n)) for n in part))
        for part in _units(model, name)
    ]


def _units(model: nn.Module, name: str) -> list[list[str]]:
    """List the names of the modules in the stem and in each of the four stages, in order.

    Raises:
        BackboneError: if the model's maps are not at the expected strides, or are not the outputs
            of consecutive modules.
    """
    info: Any = getattr(model, "feature_info", [])
    deepest = {f["reduction"]: f["module"] for f in getattr(info, "info", info)}
    if set(_STRIDES) - set(deepest):
        raise _unusable(name, f"maps at 1/{', 1/'.join(map(str, deepest)) or 'no known stride'}")
    ends = [deepest[stride] for stride in _STRIDES]
    names = list(_sequence(model, ends))
    if not set(ends) <= set(names):
        raise _unusable(name, "stages that are not consecutive modules")
    at = [names.index(end) for end in ends]
    # The first stage is a single module; the stem is everything before it.
    starts = [0, at[0], *(i + 1 for i in at[:-1])]
    stops = [at[0], *(i + 1 for i in at)]
    return [names[start:stop] for start, stop in zip(starts, stops, strict=True)]


def _sequence(module: nn.Module, ends: list[str], prefix: str = "") -> Iterator[str]:
    """Yield the names of the children in order, descending into sequences that contain an end."""
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if isinstance(child, nn.Sequential) and any(end.startswith(f"{name}.") for end in ends):
            yield from _sequence(child, ends, f"{name}.")
        else:
            yield name


def _unusable(name: str, found: str) -> BackboneError:
    wanted = ", ".join(f"1/{stride}" for stride in _STRIDES)
    return BackboneError(
        f"model.backbone: {name}: expected consecutive stages with maps (B, C, H, W) at {wanted} "
        f"of the image side, got {found}; use a ResNet, EfficientNet, RegNet or ConvNeXt"
    )


def _refuse_other_batch_norms(part: nn.Module, name: str) -> None:
    for at, module in part.named_modules():
        if isinstance(module, _BatchNorm):
            raise BackboneError(
                f"model.backbone: {name}: model.norm = 'group' can replace only 2-D batch norms, "
                f"got {type(module).__name__} ({at}), which would mix the images of a batch; "
                "choose another backbone"
            )
