"""Swin blocks: the transformer path of one encoder stage.

The blocks follow Swin (Liu et al., 2021), with the published network's channel attention at the end
of each perceptron.
"""

from __future__ import annotations

from typing import Literal

from timm.layers.drop import DropPath
from torch import Tensor, nn

from polyclinic.mtl_model.attention import WindowAttention
from polyclinic.mtl_model.blocks import ChannelAttention, recomputed

TokenMixing = Literal["proper", "published"]


class TokenMlp(nn.Module):
    """The block's two-layer perceptron, followed by channel attention.

    Args:
        channels: C.
        ratio: hidden width as a multiple of ``channels``.
        mixing: ``proper`` permutes (B, H, W, C) to (B, C, H, W) for the channel attention;
            ``published`` reshapes without permuting, as the authors' code does, which mixes tokens
            with channels.

    Shapes:
        in and out: (B, H, W, C)
    """

    def __init__(self, channels: int, ratio: float, mixing: TokenMixing) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.expand = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.shrink = nn.Linear(hidden, channels)
        self.attention = ChannelAttention()
        self.mixing = mixing

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(self.act(self.expand(x)))
        if self.mixing == "published":
            b, h, w, c = x.shape
            return self.attention(x.reshape(b, c, h, w)).reshape(b, h, w, c)
        return self.attention(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinBlock(nn.Module):
    """Pre-norm window attention and perceptron, each with a residual connection.

    Shapes:
        in and out: (B, H, W, C)
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int,
        shift: int,
        mlp_ratio: float,
        drop_path: float,
        token_mixing: TokenMixing,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = TokenMlp(channels, mlp_ratio, token_mixing)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinLayer(nn.Module):
    """The transformer path of one stage: Swin blocks, every second one with shifted windows.

    Each pixel of the feature map is one token.

    Args:
        channels: C, a multiple of ``heads``.
        heads: number of attention heads.
        window: side of a window, in tokens; reduced to ``side`` if larger.
        side: smaller side of the feature map, in pixels, at the image size that the network is
            built for. If one window covers the map, no block is shifted.
        mlp_ratio: hidden width of the perceptrons as a multiple of ``channels``.
        drop_paths: stochastic-depth rate of each block; its length is the number of blocks.
        token_mixing: see ``TokenMlp``.

    Shapes:
        in and out: (B, C, H, W)
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window: int,
        side: int,
        mlp_ratio: float,
        drop_paths: list[float],
        token_mixing: TokenMixing,
    ) -> None:
        super().__init__()
        window = min(window, side)
        shift = window // 2 if window < side else 0
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(
            *(
                SwinBlock(
                    channels, heads, window, shift if i % 2 else 0, mlp_ratio, rate, token_mixing
                )
                for i, rate in enumerate(drop_paths)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = recomputed(block, x) if self.grad_checkpointing else block(x)
        return x.permute(0, 3, 1, 2)
