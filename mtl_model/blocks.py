"""Small parts that several modules of the network share."""

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
    """Return what makes a norm from a number of channels.

    ``group`` keeps examples apart, as per-example clipping and federation ask for; ``batch`` is
    the published choice.
    """
    return group_norm if kind == "group" else nn.BatchNorm2d


def group_norm(channels: int) -> nn.GroupNorm:
    """A power of two of groups, 32 at most, each of 16 channels or more (Wu and He, 2018).

    Of channels that are no power of two the groups are few and large (48: one, 320: four), which
    keeps more of what a pretrained EfficientNet's channels say (tests/mtl_model/test_pretrained.py)
    than many would.
    """
    return nn.GroupNorm(math.gcd(32, max(channels // 16, 1), channels), channels)


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module so that its activations are computed again in the backward pass, not kept.

    Running statistics of batch norms count the batch once. torch.compile sees to that by itself:
    writes to buffers stay in its forward graph.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = checkpoint(module, x, use_reentrant=False)
        return compiled
    output: Tensor = checkpoint(
        module,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _uncounted(module)),
    )
    return output


@contextmanager
def _uncounted(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:  # a copy counts in its place
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


class ConvNorm(nn.Sequential):
    """Convolution that keeps H and W, a norm, and ReLU unless told otherwise.

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
    """Convolution of several maps as if they were concatenated, without laying them side by side.

    A convolution of a concatenation is the sum of each map's own. Apart they need no copy, and
    their smaller weights stay in a processor's cache: the gradient of one 512 x 2048 x 3 x 3 weight
    takes twice as long as those of four 512 x 512 x 3 x 3.

    Args:
        in_channels: of each map.

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
        bound = (sum(in_channels) * kernel**2) ** -0.5  # PyTorch's own, of all maps together
        for part in parts:
            nn.init.uniform_(part.weight, -bound, bound)
        self.parts = nn.ModuleList(parts)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        each = (part(x) for part, x in zip(self.parts, maps, strict=True))
        return reduce(torch.add, each)


class ChannelAttention(nn.Module):
    """Efficient channel attention: each channel weighed by its neighbours' means, plus itself.

    ECA-Net (Wang et al., 2020) with kernel 3; the residual ``x * s + x`` is the published
    network's.

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
    """Each pixel weighed by what its neighbourhood's channel mean and maximum say.

    Shapes:
        in and out: (B, C, H, W)
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.mix(pooled))  # weight: (B, 1, H, W)
