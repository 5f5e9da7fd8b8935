"""Window attention whose parameters see one example at a time.

The attention of Swin (Liu et al., 2021): windows of w x w tokens, every second block shifted by
w // 2, a learned bias for each relative position. What differs: tokens stay on their grid,
(B, H, W, C), in front of every layer with parameters, and are cut into windows only after the
qkv projection. The usual folding of windows into the batch would make per-example gradients
(differential privacy) silently bound windows instead of examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from polyclinic.mtl_model.blocks import ChannelAttention, recomputed

TokenMixing = Literal["proper", "published"]


class RelativePositionBias(nn.Module):
    """A learned number for each head and each offset between two tokens of a window.

    A module of its own that is called with the examples, and answers once for each, so that the
    gradient of its table can be told apart by example. They come last, because Opacus counts
    examples in a module's last argument.

    Shapes:
        index:    (n, n), which entry of the table each pair of tokens takes
        examples: (B, ...), of which B and the type of number are read
        out:      (B, heads, n, n), a view: the same numbers for every example
    """

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(heads, (2 * window - 1) ** 2))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, index: Tensor, examples: Tensor) -> Tensor:
        bias = self.table[:, index].to(examples.dtype)  # (heads, n, n)
        return bias.expand(examples.shape[0], *bias.shape)


def offset_index(window: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Which entry of a bias table lies between tokens i and j of a rectangle.

    Args:
        window: side that the table was made for; rows and columns are at most as many.

    Shapes:
        out: (n, n) with n = rows * columns
    """
    # A compiler makes it part of its graph; it warns of caches.
    find = _offset_index if torch.compiler.is_compiling() else _cached_offset_index
    return find(window, rows, columns, device)


def _offset_index(window: int, rows: int, columns: int, device: torch.device) -> Tensor:
    grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    position = torch.stack([axis.flatten() for axis in grid])  # (2, n)
    offset = position[:, :, None] - position[:, None, :] + window - 1  # 0 .. 2w - 2
    return (offset[0] * (2 * window - 1) + offset[1]).to(device)


@lru_cache(maxsize=256)
def _cached_offset_index(window: int, rows: int, columns: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made while predicting may be trained with later
        return _offset_index(window, rows, columns, device)


@dataclass(frozen=True)
class Band:
    """Neighbouring windows of one height (or width) along an axis."""

    start: int
    size: int  # of one window
    count: int

    @property
    def end(self) -> int:
        return self.start + self.size * self.count


def window_bands(length: int, window: int, shift: int) -> list[Band]:
    """Cut an axis at ``shift`` and then every ``window`` tokens: three strips at most.

    The windows of Swin are these, without its roll and its mask: tokens that a roll would bring
    together from opposite edges must not see each other anyway.
    """
    whole = max(length - shift, 0) // window
    cut = [Band(0, min(shift, length), 1), Band(shift, window, whole)]
    cut.append(Band(cut[1].end, length - cut[1].end, 1))
    return [strip for strip in cut if strip.size > 0 and strip.count > 0]


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
        qkv = self.qkv(x)
        columns = window_bands(x.shape[2], self.window, self.shift)
        rows = [
            _joined([self._attend(x, qkv, down, across) for across in columns], dim=2)
            for down in window_bands(x.shape[1], self.window, self.shift)
        ]
        return self.out(_joined(rows, dim=1))

    def _attend(self, x: Tensor, qkv: Tensor, down: Band, across: Band) -> Tensor:
        """The windows where two strips cross: (B, down, across, C)."""
        b, heads = x.shape[0], self.heads
        part = qkv[:, down.start : down.end, across.start : across.end]
        cut = (b, down.count, down.size, across.count, across.size, 3, heads, -1)
        part = part.reshape(cut).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = part.reshape(3, b, down.count * across.count, heads, down.size * across.size, -1)
        index = offset_index(self.window, down.size, across.size, x.device)
        # Detached: a hook on the bias would wait for a gradient that it does not give the examples.
        bias = self.bias(index, qkv.detach())
        out = windowed_attention(q, k, v, bias)
        out = out.view(b, down.count, across.count, heads, down.size, across.size, -1)
        out = out.permute(0, 1, 4, 2, 5, 3, 6)
        return out.reshape(b, down.end - down.start, across.end - across.start, -1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v in every window.

    Shapes:
        q, k, v: (B, windows, heads, n, d)
        bias:    (B, heads, n, n)
        out:     (B, windows, heads, n, d)
    """
    if bias.requires_grad and torch.is_grad_enabled() and q.device.type == "cpu":
        return _Recomputed.apply(q, k, v, bias)
    return _fused(q, k, v, bias)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """One call of scaled_dot_product_attention, windows beside examples."""
    b, windows, heads, n, _ = q.shape
    everywhere = bias.unsqueeze(1).expand(b, windows, heads, n, n).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=everywhere
    )
    return out.unflatten(0, (b, windows))


# Scores that are worked on at a time in the backward pass: few enough to stay in a core's cache.
CHUNK = 2**20


class _Recomputed(torch.autograd.Function):
    """Attention that keeps no scores for the backward pass but computes them again, in chunks.

    PyTorch's fused CPU kernel gives no gradient of the bias: without this, training would take
    the unfused way and keep three (B, windows, heads, n, n) tensors a block.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        # Detached: the fused kernel declines a bias that says it requires a gradient.
        return _fused(q.detach(), k.detach(), v.detach(), bias.detach())

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _gradients(grad, *ctx.saved_tensors)  # type: ignore[attr-defined]
        return gradients


@torch.library.custom_op("polyclinic::window_attention_gradients", mutates_args=())
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias; one operation to torch.compile, which would stop inside."""
    b, windows, heads, n, d = q.shape
    scale = d**-0.5
    slope = (grad.float() * out.float()).sum(-1, keepdim=True)  # of the softmax's denominator
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    step = max(1, CHUNK // (heads * n * n))
    for i in range(b):
        for start in range(0, windows, step):
            at = (i, slice(start, start + step))
            scores = torch.matmul(q[at] * scale, k[at].transpose(-1, -2)) + bias[i]
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
            rounded = weights.to(q.dtype)
            torch.matmul(rounded.transpose(-1, -2), grad[at], out=dv[at])
            dscores = torch.matmul(grad[at], v[at].transpose(-1, -2)).float()
            dscores = dscores.sub_(slope[at]).mul_(weights)
            dbias[i] += dscores.sum(0)
            rounded = dscores.to(q.dtype).mul_(scale)
            torch.matmul(rounded, k[at], out=dq[at])
            torch.matmul(rounded.transpose(-1, -2), q[at], out=dk[at])
    return dq, dk, dv, dbias.to(bias.dtype)


@_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(bias)


class TokenMlp(nn.Module):
    """The block's two-layer perceptron, with channel attention at its end.

    Args:
        mixing: ``proper`` moves the channels in front for the channel attention; ``published``
            reads the numbers of (B, H, W, C) as (B, C, H, W) without moving any, and back, as the
            authors' code does, which mixes tokens with channels.

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
