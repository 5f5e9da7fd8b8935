"""The UNet decoder: mask logits from the enhanced encoder maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.mtl_model.blocks import NormLayer, SplitConv


class DecoderStage(nn.Module):
    """Upsample a map by 2 and merge it with the encoder's map of the same size.

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
        else:
            # The 1x1 convolution commutes with interpolation and is 4 times cheaper before it.
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
        channels: channels of the maps, shallow to deep.
        stride: s, the image side divided by the first map's side.
        mask_channels: number of mask logits per pixel.
        upsample: ``transpose`` for transposed convolutions, ``bilinear`` for interpolation.
        norm: factory of the normalisation layers.

    Shapes:
        maps: four maps, (B, channels[k], H / (s * 2^k), W / (s * 2^k))
        out:  (B, mask_channels, H, W), logits of any sign
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
        # A 1x1 convolution commutes with interpolation and is cheaper on the smaller map.
        logits = self.mask(x)
        return F.interpolate(logits, scale_factor=self.stride, mode="bilinear", align_corners=False)
