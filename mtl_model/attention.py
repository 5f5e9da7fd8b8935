"""Window attention that supports per-example gradients.

The attention is that of Swin (Liu et al., 2021): windows of w x w tokens, every second block
shifted by w // 2, and a learned bias for each relative position. One thing differs: every layer
with parameters receives tokens on their grid, (B, H, W, C), and windows are cut only after the qkv
projection. The usual implementation folds windows into the batch dimension, so that per-example
gradient clipping (differential privacy) would silently clip windows instead of examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from polyclinic.mtl_model.attention_kernel import windowed_attention


class RelativePositionBias(nn.Module):
    """A learned bias for each head and each offset between two tokens of a window.

    This is a separate module that takes the batch as an argument and returns one copy of the bias
    per example, so that per-example gradients of the table can be computed. ``examples`` is the
    last argument because Opacus reads the batch size from a module's last argument.

    Shapes:
        index:    (n, n), the table entry for each pair of tokens
        examples: (B, ...), only B and the dtype are used
        out:      (B, heads, n, n), a view with the same values for every example
    """

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(heads, (2 * window - 1) ** 2))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, index: Tensor, examples: Tensor) -> Tensor:
        bias = self.table[:, index].to(examples.dtype)  # (heads, n, n)
        return bias.expand(examples.shape[0], *bias.shape)


def offset_index(window: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the bias-table entry for each pair of tokens in a rectangle.

    Args:
        window: side of the window that the table was built for, in tokens.
        rows: height of the rectangle in tokens, at most ``window``.
        columns: width of the rectangle in tokens, at most ``window``.
        device: device of the result.

    Shapes:
        out: (n, n) int64 with n = rows * columns, values from 0 to (2 * window - 1)^2 - 1
    """
    # torch.compile traces the computation into its graph and warns about lru_cache.
    find = _offset_index if torch.compiler.is_compiling() else _cached_offset_index
    return find(window, rows, columns, device)


def _offset_index(window: int, rows: int, columns: int, device: torch.device) -> Tensor:
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    position = torch.stack([axis.flatten() for axis in grid])  # (2, n)
    offset = position[:, :, None] - position[:, None, :] + window - 1  # 0 .. 2w - 2
    return (offset[0] * (2 * window - 1) + offset[1]).to(device)


@lru_cache(maxsize=256)
def _cached_offset_index(window: int, rows: int, columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an index cached during prediction may be used in training
        return _offset_index(window, rows, columns, device)


@dataclass(frozen=True)
class Band:
    """Consecutive windows of equal size along one axis."""

    start: int  # first token
    size: int  # tokens per window
    count: int  # number of windows

    @property
    def end(self) -> int:
        return self.start + self.size * self.count


def window_bands(length: int, window: int, shift: int) -> list[Band]:
    """Cut an axis at ``shift`` and then every ``window`` tokens, into at most three bands.

    These are the windows of Swin without its roll and its mask: the mask keeps tokens from opposite
    edges, which the roll brings together, from attending to each other.
    """
    whole = max(length - shift, 0) // window
    cut = [Band(0, min(shift, length), 1), Band(shift, window, whole)]
    cut.append(Band(cut[1].end, length - cut[1].end, 1))
    return [band for band in cut if band.size > 0 and band.count > 0]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of a token grid.

    Args:
        channels: C, a multiple of ``heads``.
        heads: number of attention heads.
        window: side w of a window, in tokens.
        shift: position of the first window border, in tokens; 0 for unshifted windows.

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
        qkv = self.qkv(x)
        columns = window_bands(x.shape[2], self.window, self.shift)
        rows = [
            _joined([self._attend(x, qkv, down, across) for across in columns], dim=2)
            for down in window_bands(x.shape[1], self.window, self.shift)
        ]
        return self.out(_joined(rows, dim=1))

    def _attend(self, x: Tensor, qkv: Tensor, down: Band, across: Band) -> Tensor:
        """Attend inside the windows where two bands cross: (B, band height, band width, C)."""
        b, heads = x.shape[0], self.heads
        part = qkv[:, down.start : down.end, across.start : across.end]
        cut = (b, down.count, down.size, across.count, across.size, 3, heads, -1)
        part = part.reshape(cut).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = part.reshape(3, b, down.count * across.count, heads, down.size * across.size, -1)
        index = offset_index(self.window, down.size, across.size, x.device)
        # Detached: hooks on the bias would otherwise wait for a gradient of its input.
        bias = self.bias(index, qkv.detach())
        out = windowed_attention(q, k, v, bias)
        out = out.view(b, down.count, across.count, heads, down.size, across.size, -1)
        out = out.permute(0, 1, 4, 2, 5, 3, 6)
        return out.reshape(b, down.end - down.start, across.end - across.start, -1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
