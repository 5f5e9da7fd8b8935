"""The ResFormer encoder: convolution and Swin-style attention, combined at every stage.

Paper: "Multi-scale Feature Enhancement in Multi-task Learning for Medical Image Analysis",
arXiv 2412.00351. This implementation follows the paper's description.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polyclinic.mtl_model.backbone import STAGES, ConvPath
from polyclinic.mtl_model.blocks import ChannelAttention
from polyclinic.mtl_model.swin import SwinLayer, TokenMixing


class PatchEmbed(nn.Module):
    """Tokens computed from the image by four parallel convolutions with growing kernels.

    Args:
        in_channels: channels of the image.
        out_channels: total channels of the result; smaller kernels get the larger shares.
        stride: s, the stride of the convolutions; their kernels are s, 2s, 4s and 8s.

    Shapes:
        in:  (B, in_channels, H, W), H and W multiples of s
        out: (B, out_channels, H / s, W / s)
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        shares = [out_channels // 2, out_channels // 4, out_channels // 8]
        shares.append(out_channels - sum(shares))
        kernels = [stride * 2**k for k in range(len(shares))]
        self.reach = nn.ModuleList(
            nn.Conv2d(in_channels, share, kernel, stride, padding=(kernel - stride) // 2)
            for share, kernel in zip(shares, kernels, strict=True)
        )
        self.attention = ChannelAttention()
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(torch.cat([conv(x) for conv in self.reach], dim=1))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """Halve the side and change the channels by two parallel convolutions of stride 2.

    Shapes:
        in:  (B, in_channels, H, W), H and W even
        out: (B, out_channels, H / 2, W / 2)
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        near = out_channels // 2
        self.near = nn.Conv2d(in_channels, near, kernel_size=2, stride=2)
        self.far = nn.Conv2d(in_channels, out_channels - near, kernel_size=4, stride=2, padding=1)
        self.attention = ChannelAttention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.attention(torch.cat([self.near(x), self.far(x)], dim=1))


class ResFormer(nn.Module):
    """Encoder with four stages, each a convolutional path and a transformer path.

    Args:
        cnn: the convolutional path; its stages determine the channels and sides of the maps.
        in_channels: channels of the image.
        swin_depth: transformer blocks per stage.
        head_channels: minimum channels per attention head. Each stage has the largest number of
            heads that divides its channels.
        window: side of an attention window, in tokens.
        side: smaller side, in pixels, of the images that the network is built for.
        mlp_ratio: hidden width of the perceptrons as a multiple of the stage's channels.
        drop_path: stochastic-depth rate of the last transformer block, in [0, 1); the rates of
            earlier blocks rise linearly from 0.
        block_order: ``sequential`` feeds the sum of the stage's map and the tokens into the
            transformer layer; ``parallel`` adds the outputs of the stage and the transformer layer.
            In the first parallel stage, both paths read the sum of stem and tokens if the shapes
            agree (as in a ResNet-34), and otherwise each path reads its own input.
        token_mixing: see ``TokenMlp``.

    Shapes:
        in:  (B, in_channels, H, W), float, H and W multiples of the encoder's ``stride``
        out: four maps, (B, channels[k], H / (cnn.stride * 2^k), W / (cnn.stride * 2^k))
    """

    def __init__(  # noqa: PLR0913 settings of one call, each used by name
        self,
        cnn: ConvPath,
        in_channels: int,
        swin_depth: int,
        head_channels: int,
        window: int,
        side: int,
        mlp_ratio: float,
        drop_path: float,
        block_order: Literal["sequential", "parallel"],
        token_mixing: TokenMixing,
    ) -> None:
        super().__init__()
        self.block_order = block_order
        self.cnn = cnn
        self.channels = cnn.channels
        self.stride = cnn.stride * 2 ** (STAGES - 1)  # image side / deepest side
        entries: list[nn.Module] = [PatchEmbed(in_channels, self.channels[0], cnn.stride)]
        for before, after in zip(self.channels, self.channels[1:], strict=False):
            entries.append(PatchMerging(before, after))
        self.tokens = nn.ModuleList(entries)
        blocks = STAGES * swin_depth
        rates = [drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        self.swins = nn.ModuleList(
            SwinLayer(
                channels,
                heads_of(channels, head_channels),
                window,
                side // (cnn.stride * 2**k),
                mlp_ratio,
                rates[k * swin_depth : (k + 1) * swin_depth],
                token_mixing,
            )
            for k, channels in enumerate(self.channels)
        )

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Turn activation checkpointing of transformer blocks and shallow stages on or off."""
        for module in self.modules():
            if isinstance(module, ConvPath | SwinLayer):
                module.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        through = self._sequential if self.block_order == "sequential" else self._parallel
        return through(x)

    def _sequential(self, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        into_stage, into_tokens = self.cnn.stemmed(image), image
        for k, (tokens, swin) in enumerate(zip(self.tokens, self.swins, strict=True)):
            maps.append(swin(self.cnn.forward_stage(k, into_stage) + tokens(into_tokens)))
            into_stage = into_tokens = maps[-1]
        return maps

    def _parallel(self, image: Tensor) -> list[Tensor]:
        into_stage, into_swin = self.cnn.stemmed(image), self.tokens[0](image)
        if self.cnn.stem_fits:
            into_stage = into_swin = into_stage + into_swin
        maps = [self.cnn.forward_stage(0, into_stage) + self.swins[0](into_swin)]
        for k in range(1, STAGES):
            into_swin = self.tokens[k](maps[-1])
            maps.append(self.cnn.forward_stage(k, maps[-1]) + self.swins[k](into_swin))
        return maps


def heads_of(channels: int, least: int) -> int:
    """Return the largest number of heads that divides the channels into parts of ``least`` or more.

    If there are fewer than ``least`` channels, there is one head.
    """
    return max(h for h in range(1, max(channels // least, 1) + 1) if channels % h == 0)
