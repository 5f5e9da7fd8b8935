"""The ResFormer encoder: a ResNet and a Swin-style transformer, joined at every stage.

Paper: "Multi-scale Feature Enhancement in Multi-task Learning for Medical Image Analysis",
arXiv 2412.00351. Written from its description. The CNN path is timm's ResNet with a stem of
stride 1, so that the four stages lie at 1/2, 1/4, 1/8 and 1/16 of the image's side.
"""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from mtl_model.attention import SwinLayer
from mtl_model.blocks import ChannelAttention, NormLayer

STAGES = 4


class PatchEmbed(nn.Module):
    """Tokens straight from the image: four convolutions of growing reach, side by side.

    Shapes:
        in:  (B, in_channels, H, W), H and W even
        out: (B, out_channels, H / 2, W / 2)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        shares = {2: out_channels // 2, 4: out_channels // 4}  # kernel: channels
        shares |= {8: out_channels // 8, 16: out_channels // 8}
        self.reach = nn.ModuleList(
            nn.Conv2d(in_channels, channels, kernel, stride=2, padding=(kernel - 2) // 2)
            for kernel, channels in shares.items()
        )
        self.attention = ChannelAttention()
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(torch.cat([conv(x) for conv in self.reach], dim=1))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """Half the side, other channels: two convolutions of stride 2, side by side.

    Shapes:
        in:  (B, in_channels, H, W), H and W even
        out: (B, out_channels, H / 2, W / 2)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.near = nn.Conv2d(in_channels, out_channels // 2, kernel_size=2, stride=2)
        self.far = nn.Conv2d(in_channels, out_channels // 2, kernel_size=4, stride=2, padding=1)
        self.attention = ChannelAttention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.attention(torch.cat([self.near(x), self.far(x)], dim=1))


class ResFormer(nn.Module):
    """Four maps of growing channels and shrinking side, each seen by convolution and attention.

    Args:
        backbone: name of a timm ResNet of basic blocks.
        width: channels of the first stage; each further stage doubles them.
        depths: CNN blocks of each stage; empty for the backbone's own.
        swin_depth: transformer blocks of each stage.
        head_channels: channels of one attention head.
        window: side of an attention window, in tokens.
        side: smaller side of the image that the network is built for, in pixels.
        drop_path: rate of the last transformer block; earlier ones rise to it from 0.
        block_order: ``sequential`` feeds what stage and tokens give into the transformer layer;
            ``parallel`` adds the transformer layer beside the stage.

    Shapes:
        in:  (B, in_channels, H, W), H and W multiples of 16
        out: four maps, (B, width * 2^k, H / 2^(k+1), W / 2^(k+1)) for k = 0..3
    """

    def __init__(
        self,
        in_channels: int,
        backbone: str,
        width: int,
        depths: tuple[int, ...],
        swin_depth: int,
        head_channels: int,
        window: int,
        side: int,
        mlp_ratio: float,
        drop_path: float,
        block_order: Literal["sequential", "parallel"],
        norm: NormLayer,
    ) -> None:
        super().__init__()
        self.block_order = block_order
        self.channels = tuple(width * 2**k for k in range(STAGES))
        self.stem, self.stages = _resnet(backbone, in_channels, self.channels, depths, norm)
        entries: list[nn.Module] = [PatchEmbed(in_channels, width)]
        for before, after in zip(self.channels, self.channels[1:], strict=False):
            entries.append(PatchMerging(before, after))
        self.tokens = nn.ModuleList(entries)
        blocks = STAGES * swin_depth
        rates = [drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        self.swins = nn.ModuleList(
            SwinLayer(
                channels,
                channels // head_channels,
                window,
                side // 2 ** (k + 1),
                mlp_ratio,
                rates[k * swin_depth : (k + 1) * swin_depth],
            )
            for k, channels in enumerate(self.channels)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        through = self._sequential if self.block_order == "sequential" else self._parallel
        return through(x)

    def _sequential(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        into_stage, into_tokens = self.stem(image), image
        for stage, tokens, swin in zip(self.stages, self.tokens, self.swins, strict=True):
            maps.append(swin(stage(into_stage) + tokens(into_tokens)))
            into_stage = into_tokens = maps[-1]
        return maps

    def _parallel(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image) + self.tokens[0](image)
        maps = [self.stages[0](x) + self.swins[0](x)]
        for stage, tokens, swin in zip(
            self.stages[1:], self.tokens[1:], self.swins[1:], strict=True
        ):
            maps.append(stage(maps[-1]) + swin(tokens(maps[-1])))
        return maps


def _resnet(
    backbone: str,
    in_channels: int,
    channels: tuple[int, ...],
    depths: tuple[int, ...],
    norm: NormLayer,
) -> tuple[nn.Sequential, nn.ModuleList]:
    """A timm ResNet's stem (7x7, here with stride 1, and pooling) and its four stages.

    timm fixes 64 channels between a plain stem and stage 1; its deep stem is as wide as told. So
    the network is made with a deep stem and the convolution is put in its place.
    """
    shape: dict[str, Any] = {"layers": depths} if depths else {}
    resnet: Any = timm.create_model(
        backbone,
        pretrained=False,
        num_classes=0,
        in_chans=in_channels,
        channels=channels,
        norm_layer=norm,
        stem_type="deep",
        stem_width=channels[0] // 2,
        zero_init_last=False,  # a block that starts as identity gives its first norm no gradient
        **shape,
    )
    resnet.conv1 = nn.Conv2d(in_channels, channels[0], kernel_size=7, padding=3, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    for module in resnet.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # hooks on the norm before it must see its output unchanged
    stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool)
    stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])
    return stem, stages
