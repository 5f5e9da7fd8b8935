"""Small parts that several modules of the network share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


def norm_layer(kind: Literal["group", "batch"]) -> NormLayer:
    """Return what makes a norm from a number of channels.

    ``group`` keeps examples apart, as per-example clipping and federation ask for; ``batch`` is
    the published choice.
    """
    return group_norm if kind == "group" else partial(nn.BatchNorm2d)


def group_norm(channels: int, **_unused: object) -> nn.GroupNorm:
    """Groups of 16 channels, or at most 32 groups (Wu and He, 2018).

    timm passes device and dtype by keyword to whatever makes its norms; both stay the default.
    """
    return nn.GroupNorm(math.gcd(32, max(channels // 16, 1)), channels)


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
