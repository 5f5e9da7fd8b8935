"""Dilated feature enhancement: what a skip connection carries, seen at several scales.

Paper: arXiv 2412.00351. ``concat`` is the paper's figure, ``sum`` the leaner form of its second
experiment.
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
    """Build one stage's module.

    Args:
        rates: dilations of the 3x3 branches. On a small map a larger dilation reaches only
            padding and its outer weights would never be used, so each is cut to ``side - 1``.
        side: the map's smaller side at the size the network is built for, in pixels.
    """
    rates = tuple(max(1, min(rate, side - 1)) for rate in rates)
    if kind == "concat":
        return ConcatEnhancement(channels, rates, norm)
    if kind == "sum":
        return SumEnhancement(channels, rates, norm)
    return nn.Identity()


class ConcatEnhancement(nn.Module):
    """Branches side by side, fused by a convolution, beside a shortcut.

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
    """Branches added up; no shortcut.

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
