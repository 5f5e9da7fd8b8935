"""Dilated feature enhancement (DFE): dilated convolutions on the skip connections.

Paper: arXiv 2412.00351. ``concat`` is the module in the paper's figure, ``sum`` is the smaller
variant of its second experiment.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from polyclinic.mtl_model.blocks import ConvNorm, NormLayer, SpatialAttention, SplitConv


def build_dfe(
    kind: Literal["concat", "sum", "none"],
    channels: int,
    rates: tuple[int, ...],
    side: int,
    norm: NormLayer,
) -> nn.Module:
    """Build the enhancement module of one stage.

    Args:
        kind: ``concat``, ``sum``, or ``none`` for the identity.
        channels: C.
        rates: dilations of the 3x3 branches, in pixels. On a small map, a large dilation reaches
            only padding and its outer weights would never be used, so each is limited to
            ``side - 1``.
        side: smaller side of the map, in pixels, at the image size the network is built for.
        norm: factory of the normalisation layers.
    """
    rates = tuple(max(1, min(rate, side - 1)) for rate in rates)
    if kind == "concat":
        return ConcatEnhancement(channels, rates, norm)
    if kind == "sum":
        return SumEnhancement(channels, rates, norm)
    return nn.Identity()


class ConcatEnhancement(nn.Module):
    """Dilated branches, concatenated and fused by a convolution, with a shortcut connection.

    Shapes:
        in and out: (B, C, H, W)
    """

    def __init__(self, channels: int, rates: tuple[int, ...], norm: NormLayer) -> None:
        super().__init__()
        self.point = ConvNorm(channels, channels, 1, norm)
        self.dilated = nn.ModuleList(
            ConvNorm(channels, channels, 3, norm, dilation=rate) for rate in rates
        )
        self.fuse = SplitConv([channels] * (1 + len(rates)), channels, 3)
        self.fuse_norm = norm(channels)
        self.shortcut = ConvNorm(channels, channels, 1, norm, act=False)
        self.attention = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.point(x), *(branch(x) for branch in self.dilated)]
        fused = self.fuse_norm(self.fuse(branches))
        return self.attention(torch.relu(fused + self.shortcut(x)))


class SumEnhancement(nn.Module):
    """Sum of dilated branches, without a shortcut connection.

    Shapes:
        in and out: (B, C, H, W)
    """

    def __init__(self, channels: int, rates: tuple[int, ...], norm: NormLayer) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(
            nn.Sequential(
                ConvNorm(channels, channels, 3, norm, dilation=rate, act=False),
                ConvNorm(channels, channels, 1, norm, act=False),
            )
            for rate in rates
        )
        self.attention = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        total = reduce(torch.add, (branch(x) for branch in self.dilated))
        return self.attention(torch.relu(total))
