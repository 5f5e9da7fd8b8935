"""From enhanced encoder maps to a mask: a UNet decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.mtl_model.blocks import NormLayer, SplitConv


class DecoderStage(nn.Module):
    """Twice the side, the skip's channels, and what the encoder saw at that side.

    Shapes:
        deep: (B, D, H, W)
        skip: (B, C, 2H, 2W)
        out:  (B, C, 2H, 2W)
    """

    def __init__(
        self,
        deep_channels: int,
        channels: int,
        upsample: Literal["transpose", "bilinear"],
        norm: NormLayer,
    ) -> None:
        super().__init__()
        self.up: nn.Module
        if upsample == "transpose":
            self.up = nn.ConvTranspose2d(deep_channels, channels, kernel_size=2, stride=2)
        else:  # the 1x1 convolution first: it commutes with interpolation and is 4 times cheaper
            self.up = nn.Sequential(
                nn.Conv2d(deep_channels, channels, kernel_size=1),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            )
        self.merge = SplitConv([channels, channels], channels, 3)
        self.merge_norm = norm(channels)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return torch.relu(self.merge_norm(self.merge([self.up(deep), skip])))


class Decoder(nn.Module):
    """Mask logits from the four encoder maps.

    Args:
        channels: of the maps, shallow to deep.
        stride: s, image side over the first map's side.

    Shapes:
        maps: four, (B, channels[k], H / (s * 2^k), W / (s * 2^k))
        out:  (B, mask_channels, H, W)
    """

    def __init__(
        self,
        channels: Sequence[int],
        stride: int,
        mask_channels: int,
        upsample: Literal["transpose", "bilinear"],
        norm: NormLayer,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            DecoderStage(deep, shallow, upsample, norm)
            for deep, shallow in pairwise(reversed(channels))
        )
        self.mask = nn.Conv2d(channels[0], mask_channels, kernel_size=1)
        self.stride = stride

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = maps
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        logits = self.mask(x)  # before the interpolation, with which a 1x1 convolution commutes
        return F.interpolate(logits, scale_factor=self.stride, mode="bilinear", align_corners=False)
