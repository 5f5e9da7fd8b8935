"""A faster form of the network for inference only."""

from __future__ import annotations

import copy

import torch
from timm.layers.conv_bn_act import ConvNormAct
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from polyclinic.mtl_model.blocks import SplitConv
from polyclinic.mtl_model.network import MultiTaskUNet, Prediction
from polyclinic.mtl_model.tasks import TASKS, Task


class InferenceForm(nn.Module):
    """A copy of a network in evaluation mode, optimised for speed.

    Batch norms are folded into the convolutions before them, ReLUs work in place, the memory format
    is channels_last, and in bf16 the weights are rounded once instead of at every call.

    Args:
        network: the network to copy; it is not changed.
        precision: float32 gives the same results up to rounding; bfloat16 has 8 significant bits.

    Shapes:
        as in ``MultiTaskUNet``
    """

    def __init__(self, network: MultiTaskUNet, precision: torch.dtype = torch.float32) -> None:
        super().__init__()
        ready = copy.deepcopy(network).eval()
        for module in list(ready.modules()):
            _fold(module)
            if isinstance(module, nn.ReLU):
                module.inplace = True
        self.network = ready.to(precision).to(memory_format=torch.channels_last)
        self.precision = precision

    @torch.no_grad()
    def forward(self, images: Tensor, tasks: tuple[Task, ...] = TASKS) -> Prediction:
        answer: Prediction = self.network(images.to(self.precision), tasks)
        return answer


# Modules of other packages that call their children in the order of their definition.
_IN_ORDER = (
    BasicBlock,
    Bottleneck,
    ConvBnAct,
    ConvNormAct,
    DepthwiseSeparableConv,
    InvertedResidual,
)


def _fold(parent: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, among the direct children of a module.

    This is valid only if the children are called in the order of their definition, which is known
    for sequences, for this package's modules (tests compare their outputs) and for some of timm's.
    Norms in other modules are kept: RepViT, for example, normalises a sum of convolutions.
    """
    in_sequence = type(parent).forward is nn.Sequential.forward
    own = type(parent).__module__.startswith("polyclinic.mtl_model.")
    if not (in_sequence or own or type(parent) in _IN_ORDER):
        return
    before: tuple[str, nn.Conv2d | SplitConv] | None = None
    for name, child in list(parent.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            if before is not None and before[1].out_channels == child.num_features:
                setattr(parent, before[0], _folded(before[1], child))
                rest = [child.get_submodule(n) for n in ("drop", "act") if hasattr(child, n)]
                setattr(parent, name, nn.Sequential(*rest))  # timm's norms drop and act too
            before = None
        elif isinstance(child, nn.Conv2d | SplitConv):
            before = name, child
        elif not isinstance(child, nn.Identity):
            before = None


def _folded(conv: nn.Conv2d | SplitConv, norm: nn.BatchNorm2d) -> nn.Module:
    if isinstance(conv, nn.Conv2d):
        return fuse_conv_bn_eval(conv, norm)
    parts = [part for part in conv.parts if isinstance(part, nn.Conv2d)]
    folded = [fuse_conv_bn_eval(part, norm) for part in parts]
    for part in folded[1:]:
        part.bias = None  # the bias is added once, by the first part
    conv.parts = nn.ModuleList(folded)
    return conv
