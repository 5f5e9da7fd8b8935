"""Changes to the layers of a timm model that the convolutional path requires."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from polyclinic.mtl_model.blocks import NormLayer


class CloneIfView(nn.Module):
    """Identity that copies its input if it is a view.

    Backward hooks turn a module's output into a view, and timm's ResNet blocks add to that output
    in place, which autograd forbids for such views. Under torch.compile no copy is needed.

    Shapes:
        in and out: any
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return x
        return x.clone() if torch.is_grad_enabled() and x._is_view() else x


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding as constants.

    The padding is correct for maps with sides that are multiples of the stride, which the network
    ensures by padding its images. timm computes it from the map's sides instead; with symbolic
    sizes, as in ONNX export, those expressions grow from layer to layer until simplifying them
    takes more than ten minutes.

    Shapes:
        in:  (B, in_channels, H, W)
        out: (B, out_channels, H / stride, W / stride)
    """

    margins: tuple[int, ...]  # left, right, top, bottom, in pixels

    @classmethod
    def like(cls, conv: Conv2dSame) -> SameConv:
        """Make an equivalent layer that shares the parameters of ``conv``."""
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


def reset_zero_init(model: nn.Module) -> None:
    """Set gains that are initialised to 0 at the end of residual branches to 1.

    With a gain of 0 (a norm's weight, NFNet's gain), the inner layers of the branch would receive
    no gradient in the first steps. A few models initialise a full weight to 0; it is not changed.
    """
    for name, parameter in model.named_parameters():
        is_gain = max(parameter.shape[1:], default=1) == 1 and not name.endswith("bias")
        if is_gain:
            with torch.no_grad():
                parameter.masked_fill_(parameter == 0, 1.0)


def halve_stride(stem: nn.Module) -> bool:
    """Halve the stride of the first strided convolution of a stem; False if there is none."""
    for module in stem.modules():
        if isinstance(module, nn.Conv2d) and module.stride[0] > 1:
            stride = module.stride[0] // 2
            module.stride = (stride, stride)
            if not isinstance(module.padding, str):
                module.padding = tuple(math.ceil((k - stride) / 2) for k in module.kernel_size)
            return True
    return False


def keep_outputs(part: nn.Module) -> None:
    """Turn off in-place operations, because hooks need the unmodified output of each module."""
    for module in part.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False
        if isinstance(module, BasicBlock | Bottleneck):
            module.drop_path = CloneIfView()


def fix_padding(module: nn.Module) -> None:
    """Replace TensorFlow-style convolutions of timm by ``SameConv``."""
    for name, child in module.named_children():
        if isinstance(child, Conv2dSame):
            setattr(module, name, SameConv.like(child))
        else:
            fix_padding(child)


def replace_batch_norms(module: nn.Module, norm: NormLayer) -> None:
    """Replace 2-D batch norms by other norms, with the scale and shift of the batch norms."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            other = norm(child.num_features)
            other.load_state_dict({"weight": child.weight, "bias": child.bias})
            if isinstance(child, BatchNormAct2d):
                other = nn.Sequential(OrderedDict(norm=other, drop=child.drop, act=child.act))
            setattr(module, name, other)
        else:
            replace_batch_norms(child, norm)
