"""Layers and norms that several modules of the network share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NormLayer = Callable[[int], nn.Module]


def norm_layer(kind: Literal["group", "batch"]) -> NormLayer:
    """Return the factory of normalisation layers, a function of the number of channels.

    ``group`` normalises each example separately, as per-example clipping and federated training
    require; ``batch`` is the choice of the published network.
    """
    return group_norm if kind == "group" else nn.BatchNorm2d


def group_norm(channels: int) -> nn.GroupNorm:
    """Build a group norm (Wu and He, 2018) with groups of at least 16 channels where possible.

    The number of groups is a power of two, at most 32. Channel counts that are not a power of two
    get few, large groups (48 channels: one group; 320: four), which preserves more of the features
    of a pretrained EfficientNet than many small groups (tests/mtl_model/test_pretrained.py).
    """
    return nn.GroupNorm(math.gcd(32, max(channels // 16, 1), channels), channels)


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module with activation checkpointing: recompute its activations in the backward pass.

    Running statistics of batch norms are updated only in the first pass. Under torch.compile this
    needs no extra care, because writes to buffers stay in the forward graph.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = checkpoint(module, x, use_reentrant=False)
        return compiled
    output: Tensor = checkpoint(
        module,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _frozen_statistics(module)),
    )
    return output


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leave the running statistics of a module's batch norms unchanged."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:  # count in a copy, which is discarded
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


class ConvNorm(nn.Sequential):
    """Convolution that preserves H and W, a norm, and ReLU unless ``act`` is False.

    Shapes:
        in:  (B, in_channels, H, W)
        out: (B, out_channels, H, W)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        norm: NormLayer,
        dilation: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel,
                padding=dilation * (kernel // 2),
                dilation=dilation,
                bias=False,
            ),
            norm(out_channels),
            nn.ReLU() if act else nn.Identity(),
        )


class SplitConv(nn.Module):
    """Convolution of several maps as if they were concatenated along the channels.

    A convolution of a concatenation is the sum of the convolutions of its parts. Computing the
    parts separately avoids the copy, and the smaller weights stay in the processor's cache: the
    gradient of one 512 x 2048 x 3 x 3 weight takes twice as long as the gradients of four
    512 x 512 x 3 x 3 weights.

    Args:
        in_channels: channels of each map.
        out_channels: channels of the result.
        kernel: side of the kernel, odd.

    Shapes:
        maps: (B, in_channels[k], H, W)
        out:  (B, out_channels, H, W)
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, kernel: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        parts = [
            nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
            for channels in in_channels
        ]
        bound = (sum(in_channels) * kernel**2) ** -0.5  # PyTorch's default for the whole input
        for part in parts:
            nn.init.uniform_(part.weight, -bound, bound)
        self.parts = nn.ModuleList(parts)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        each = (part(x) for part, x in zip(self.parts, maps, strict=True))
        return reduce(torch.add, each)


class ChannelAttention(nn.Module):
    """Efficient channel attention with a residual connection.

    Each channel is weighted by a sigmoid of a 1-D convolution over the channel means, with kernel 3
    (ECA-Net, Wang et al., 2020). The residual ``x * s + x`` follows the published network.

    Shapes:
        in and out: (B, C, H, W)
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3)).unsqueeze(1)  # (B, 1, C)
        weight = torch.sigmoid(self.mix(mean)).squeeze(1)  # (B, C)
        return x + x * weight[:, :, None, None]


class SpatialAttention(nn.Module):
    """Spatial attention: weight each pixel by a convolution of the channel mean and maximum.

    Shapes:
        in and out: (B, C, H, W)
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.mix(pooled))  # weight: (B, 1, H, W)
