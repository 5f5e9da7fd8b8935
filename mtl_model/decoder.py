"""From enhanced encoder maps to a mask: a UNet decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_model.blocks import ConvNorm, NormLayer


class DecoderStage(nn.Module):
    """Twice the side, half the channels, and what the encoder saw at that side.

    Shapes:
        deep: (B, 2C, H, W)
        skip: (B, C, 2H, 2W)
        out:  (B, C, 2H, 2W)
    """

    def __init__(
        self, channels: int, upsample: Literal["transpose", "bilinear"], norm: NormLayer
    ) -> None:
        super().__init__()
        self.up: nn.Module
        if upsample == "transpose":
            self.up = nn.ConvTranspose2d(2 * channels, channels, kernel_size=2, stride=2)
        else:  # the 1x1 convolution first: it commutes with interpolation and is 4 times cheaper
            self.up = nn.Sequential(
                nn.Conv2d(2 * channels, channels, kernel_size=1),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            )
        self.merge = ConvNorm(2 * channels, channels, 3, norm)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        return self.merge(torch.cat([self.up(deep), skip], dim=1))


class Decoder(nn.Module):
    """Mask logits from the four encoder maps.

    Args:
        channels: of the maps, shallow to deep, each twice the one before.

    Shapes:
        maps: four, (B, channels[k], H / 2^(k+1), W / 2^(k+1))
        out:  (B, mask_classes, H, W)
    """

    def __init__(
        self,
        channels: Sequence[int],
        mask_classes: int,
        upsample: Literal["transpose", "bilinear"],
        norm: NormLayer,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            DecoderStage(width, upsample, norm) for width in reversed(channels[:-1])
        )
        self.mask = nn.Conv2d(channels[0], mask_classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = maps
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        logits = self.mask(x)  # before the interpolation, with which a 1x1 convolution commutes
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
