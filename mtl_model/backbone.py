"""The convolutional path: a timm model cut into a stem and four stages.

Widths and strides are read from timm (``feature_info``), so that any of its models whose maps lie
at 1/4, 1/8, 1/16 and 1/32 of the image's side can serve; a stem of half the stride brings them to
1/2 .. 1/16, where the published network has them.
"""

from __future__ import annotations

import difflib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyclinic.mtl_model.blocks import NormLayer, recomputed

STAGES = 4
RECOMPUTED_STAGES = 3  # whose activations are large for what it costs to compute them again
_STRIDES = (4, 8, 16, 32)  # of the four maps in a timm model as it comes
_PROBE = 64  # side of the image that a cut model is tried on, in pixels


class CloneIfView(nn.Module):
    """A tensor of its own in place of a view that a hook made: timm's ResNet blocks add to it in
    place, which autograd forbids for views of that kind. torch.compile writes nothing in place.

    Shapes:
        in and out: any
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return x
        return x.clone() if torch.is_grad_enabled() and x._is_view() else x


class _SameConv(nn.Conv2d):
    """TensorFlow's padding, of maps whose sides are multiples of the stride: the network pads its
    images so that they are.

    timm reckons it from the map's sides. Where these are symbols, as for ONNX, the expressions grow
    from one such layer to the next until they are not simplified in ten minutes.

    Shapes:
        in:  (B, in_channels, H, W)
        out: (B, out_channels, H / stride, W / stride)
    """

    margins: tuple[int, ...]  # left, right, above, below

    @classmethod
    def like(cls, conv: Conv2dSame) -> _SameConv:
        """One of the same sizes, with the other's own parameters."""
        (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
        same = cls(
            conv.in_channels,
            conv.out_channels,
            (kh, kw),
            (sh, sw),
            dilation=(dh, dw),
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        same.weight, same.bias = conv.weight, conv.bias
        down, across = max((kh - 1) * dh + 1 - sh, 0), max((kw - 1) * dw + 1 - sw, 0)
        same.margins = (across // 2, across - across // 2, down // 2, down - down // 2)
        return same

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.margins))


class BackboneError(ValueError):
    """A timm model cannot serve as the network's convolutional path. The message says why."""


class ConvPath(nn.Module):
    """A timm model's stem and its four stages, to be called one by one.

    Args:
        channels: of the four stages' maps.
        stride: image side over the side of the first stage's map.
        stem_fits: whether the stem's map has the shape of the first stage's.

    Shapes:
        stem:      from (B, in_channels, H, W)
        stages[k]: to (B, channels[k], H / (stride * 2^k), W / (stride * 2^k))
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
        """The map of stage k; of the largest maps, activations may be computed again."""
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
    """Build a timm model and cut it.

    Args:
        name: of the timm model.
        stride: 4 for the model's own strides, 2 for a stem of half the stride.
        norm: what makes the norms that take the place of batch norms, their scale and shift kept;
            None keeps the batch norms. Other norms (ConvNeXt's layer norms) stay as they are.
        width: channels of the first stage, each further one twice as many; 0 for the model's own.
        depths: blocks of each stage; empty for the model's own.
        weights: state dict of the timm model, else random weights.

    Raises:
        BackboneError: if timm has no such model, it has no such stages, or it is no ResNet and
            ``width`` or ``depths`` is given.
    """
    model = timm_model(name, in_channels, width, depths)
    if weights is None:
        reset_zero_init(model)
    else:
        model.load_state_dict(weights)
    stem, *stages = parts = _cut(model, name)
    if stride < _STRIDES[0]:
        _halve_stride(stem, name)
    for part in parts:
        if norm is not None:
            _replace_batch_norms(part, norm)
            _refuse_other_batch_norms(part, name)
        _keep_outputs(part)
        _fix_padding(part)
    shapes = _tried(parts, in_channels, stride, name)
    channels = tuple(shape[0] for shape in shapes[1:])
    return ConvPath(stem, stages, channels, stride, stem_fits=shapes[0] == shapes[1])


@torch.no_grad()
def _tried(
    parts: Sequence[nn.Module], in_channels: int, stride: int, name: str
) -> list[tuple[int, ...]]:
    """(C, H, W) of the stem's and the stages' maps, found by running an empty image through them.

    Raises:
        BackboneError: if a map is not where it should be.
    """
    x = torch.zeros(1, in_channels, _PROBE, _PROBE)
    shapes = []
    for part in parts:
        try:
            x = part.eval()(x)
        except (AssertionError, RuntimeError) as error:  # sizes that it does not take
            raise _unusable(name, f"{error} for an image of {_PROBE} pixels") from None
        if not isinstance(x, Tensor):
            raise _unusable(name, f"a stage that gives a {type(x).__name__} of maps")
        part.train()
        shapes.append(tuple(x.shape[1:]))
    sides = [_PROBE // (stride * 2**k) for k in range(STAGES)]
    if [shape[1:] for shape in shapes[1:]] != [(side, side) for side in sides]:
        raise _unusable(name, f"(C, H, W) of {shapes[1:]} for an image of {_PROBE} pixels")
    return shapes


def timm_model(
    name: str, in_channels: int, width: int = 0, depths: tuple[int, ...] = ()
) -> nn.Module:
    """Make a timm model with random weights; ``width`` and ``depths`` as for build_conv_path.

    Raises:
        BackboneError: if there is no such model, or it is no ResNet that could be made narrower.
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
            f"model.width and model.depths: only ResNets come in other sizes, {name} does not"
        )
    known = timm.get_pretrained_cfg(name)
    if width and known is not None and known.first_conv != "conv1":
        raise BackboneError(
            f"model.width: expected a ResNet whose stem is one convolution, as resnet34's, got "
            f"{name}, whose is not"
        )
    if width:
        # timm fixes 64 channels between a plain stem and stage 1; a deep stem is as wide as told,
        # so the model is made with one and the plain convolution put in its place.
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


def reset_zero_init(model: nn.Module) -> None:
    """Let no residual branch start at zero: its inner layers would get no gradient at first.

    Such a branch ends in a gain of 0 (a norm's weight, NFNet's gain), or, in a few models, in a
    weight of 0, which is left.
    """
    for name, parameter in model.named_parameters():
        is_gain = max(parameter.shape[1:], default=1) == 1 and not name.endswith("bias")
        if is_gain:
            with torch.no_grad():
                parameter.masked_fill_(parameter == 0, 1.0)


def names_of_path(model: nn.Module, name: str) -> list[str]:
    """Names of the model's state that belong to its stem and stages.

    Raises:
        BackboneError: as ``build_conv_path``.
    """
    units = [unit for part in _units(model, name) for unit in part]
    return [n for n in model.state_dict() if any(n.startswith(f"{unit}.") for unit in units)]


def _cut(model: nn.Module, name: str) -> list[nn.Sequential]:
    """Stem and four stages, each a sequence of the model's own modules under their own names."""
    return [
        nn.Sequential(OrderedDict((n.replace(".", "_"), model.get_submodule(n)) for n in part))
        for part in _units(model, name)
    ]


def _units(model: nn.Module, name: str) -> list[list[str]]:
    """Names of the modules that make up the stem and each of the four stages, in order.

    Raises:
        BackboneError: if the model's maps do not lie at the expected strides, or are not the
            outputs of modules that follow one another.
    """
    info: Any = getattr(model, "feature_info", [])
    deepest = {f["reduction"]: f["module"] for f in getattr(info, "info", info)}
    if set(_STRIDES) - set(deepest):
        raise _unusable(name, f"maps at 1/{', 1/'.join(map(str, deepest)) or 'no known stride'}")
    ends = [deepest[stride] for stride in _STRIDES]
    names = list(_sequence(model, ends))
    if not set(ends) <= set(names):
        raise _unusable(name, "stages that are not modules in a row")
    at = [names.index(end) for end in ends]
    # The stem reaches up to the first stage's last module, each later stage begins behind another.
    starts = [0, at[0], *(i + 1 for i in at[:-1])]
    stops = [at[0], *(i + 1 for i in at)]
    return [names[start:stop] for start, stop in zip(starts, stops, strict=True)]


def _sequence(module: nn.Module, ends: list[str], prefix: str = "") -> Iterator[str]:
    """Names of the children in order, sequences opened where an end lies inside."""
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        if isinstance(child, nn.Sequential) and any(end.startswith(f"{name}.") for end in ends):
            yield from _sequence(child, ends, f"{name}.")
        else:
            yield name


def _unusable(name: str, found: str) -> BackboneError:
    wanted = ", ".join(f"1/{stride}" for stride in _STRIDES)
    return BackboneError(
        f"model.backbone: {name}: expected stages one after the other with maps (B, C, H, W) at "
        f"{wanted} of the image's side, found {found}; ResNets, EfficientNets, RegNets and "
        "ConvNeXts have them"
    )


def _halve_stride(stem: nn.Module, name: str) -> None:
    for module in stem.modules():
        if isinstance(module, nn.Conv2d) and module.stride[0] > 1:
            stride = module.stride[0] // 2
            module.stride = (stride, stride)
            if not isinstance(module.padding, str):
                module.padding = tuple(math.ceil((k - stride) / 2) for k in module.kernel_size)
            return
    raise _unusable(name, "no convolution with a stride in its stem")


def _refuse_other_batch_norms(part: nn.Module, name: str) -> None:
    for at, module in part.named_modules():
        if isinstance(module, _BatchNorm):
            raise BackboneError(
                f"model.backbone: {name}: expected no batch norms but of maps, which model.norm = "
                f"'group' replaces, found {type(module).__name__} ({at}), which would let one "
                "image act on others; choose another backbone"
            )


def _keep_outputs(part: nn.Module) -> None:
    """Let no module write into the output of the one before it, which hooks want as it was."""
    for module in part.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False
        if isinstance(module, BasicBlock | Bottleneck):
            module.drop_path = CloneIfView()


def _fix_padding(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Conv2dSame):
            setattr(module, name, _SameConv.like(child))
        else:
            _fix_padding(child)


def _replace_batch_norms(module: nn.Module, norm: NormLayer) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            other = norm(child.num_features)
            other.load_state_dict({"weight": child.weight, "bias": child.bias})
            if isinstance(child, BatchNormAct2d):
                other = nn.Sequential(OrderedDict(norm=other, drop=child.drop, act=child.act))
            setattr(module, name, other)
        else:
            _replace_batch_norms(child, norm)
