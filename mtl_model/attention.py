"""Window attention whose parameters see one example at a time.

The attention of Swin (Liu et al., 2021): windows of w x w tokens, every second block shifted by
w // 2, a learned bias for each relative position. What differs: tokens stay on their grid,
(B, H, W, C), in front of every layer with parameters, and are cut into windows only after the
qkv projection. The usual folding of windows into the batch would make per-example gradients
(differential privacy) silently bound windows instead of examples.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from mtl_model.blocks import ChannelAttention


class RelativePositionBias(nn.Module):
    """A learned number for each head and each offset between two tokens of a window.

    A module of its own that is called with the examples, and answers once for each, so that the
    gradient of its table can be told apart by example.

    Shapes:
        in:  (B, ...), only B is read
        out: (B, heads, N, N), a view: the same numbers for every example
    """

    index: Tensor

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(heads, (2 * window - 1) ** 2))
        nn.init.trunc_normal_(self.table, std=0.02)
        self.register_buffer("index", _offset_index(window), persistent=False)

    def forward(self, examples: Tensor) -> Tensor:
        bias = self.table[:, self.index]  # (heads, N, N)
        return bias.expand(examples.shape[0], *bias.shape)


def _offset_index(window: int) -> Tensor:
    """(N, N): which of the (2w - 1)^2 offsets lies between token i and token j of a window."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    position = torch.stack([rows.flatten(), columns.flatten()])  # (2, N)
    offset = position[:, :, None] - position[:, None, :] + window - 1  # 0 .. 2w - 2
    return offset[0] * (2 * window - 1) + offset[1]


@lru_cache(maxsize=64)
def _apart(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor | None:
    """(windows, 1, N, N) of 0 and -inf: which tokens of a window must not see each other.

    Tokens of one window are apart if the shift brought them together from opposite edges, or if
    one of them is padding. None where no window holds such a pair.
    """
    high, wide = _padded(height, window), _padded(width, window)
    if shift == 0 and (high, wide) == (height, width):
        return None
    region = torch.full((high, wide), -1)  # padding
    edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else ()
    region[:height, :width] = 0
    if shift:
        region = region.roll((-shift, -shift), (0, 1))
        padding = region < 0
        for i, rows in enumerate(edges):
            for j, columns in enumerate(edges):
                region[rows, columns] = 3 * i + j
        region[padding] = -1
    parts = region.view(high // window, window, wide // window, window).transpose(1, 2)
    parts = parts.reshape(-1, window * window)  # (windows, N)
    together = parts[:, :, None] == parts[:, None, :]
    mask = torch.zeros(together.shape).masked_fill_(~together, float("-inf"))
    return mask.unsqueeze(1).to(device)


def _padded(length: int, window: int) -> int:
    return -(-length // window) * window


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of a token grid.

    Args:
        channels: C, a multiple of ``heads``.
        window: side w of a window, in tokens.
        shift: how far windows lie up and left of the grid's own, in tokens; 0 for none.

    Shapes:
        in and out: (B, H, W, C); H and W need not be multiples of w
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.shift = shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.bias = RelativePositionBias(window, heads)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        side, heads = self.window, self.heads
        high, wide = _padded(h, side), _padded(w, side)
        qkv = self.qkv(x)
        if (high, wide) != (h, w):
            qkv = F.pad(qkv, (0, 0, 0, wide - w, 0, high - h))
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), (1, 2))
        grid = (b, high // side, side, wide // side, side)
        qkv = qkv.view(*grid, 3, heads, c // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, b, -1, heads, side * side, c // heads)  # (B, windows, heads, N, d)
        bias = self.bias(x).unsqueeze(1)  # (B, 1, heads, N, N)
        mask = _apart(h, w, side, self.shift, x.device)
        if mask is not None:
            bias = bias + mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x.view(b, grid[1], grid[3], heads, side, side, c // heads).permute(0, 1, 4, 2, 5, 3, 6)
        x = x.reshape(b, high, wide, c)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return self.out(x[:, :h, :w])


class TokenMlp(nn.Module):
    """The block's two-layer perceptron, with channel attention at its end.

    The published code reshapes (B, N, C) to (B, C, H, W) before the channel attention, which
    mixes tokens with channels; here the axes are moved properly.

    Shapes:
        in and out: (B, H, W, C)
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.expand = nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.shrink = nn.Linear(hidden, channels)
        self.attention = ChannelAttention()

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(self.act(self.expand(x)))
        return self.attention(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinBlock(nn.Module):
    """Pre-norm window attention and perceptron, each added to what came in.

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
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = TokenMlp(channels, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinLayer(nn.Module):
    """One stage's transformer path: blocks on a map's pixels as tokens, every second one shifted.

    Args:
        drop_paths: one rate a block; its length is the number of blocks.
        side: the map's smaller side at the size the network is built for, in pixels. A map of
            one window is not shifted, and no window is larger than it.

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
    ) -> None:
        super().__init__()
        window = min(window, side)
        shift = window // 2 if window < side else 0
        self.blocks = nn.Sequential(
            *(
                SwinBlock(channels, heads, window, shift if i % 2 else 0, mlp_ratio, rate)
                for i, rate in enumerate(drop_paths)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
