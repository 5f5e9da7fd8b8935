"""Scaled dot-product attention with a bias, inside windows.

On a CPU, training uses a custom autograd function that needs less memory than PyTorch's attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(d) + bias) v in every window.

    Shapes:
        q, k, v: (B, windows, heads, n, d)
        bias:    (B, heads, n, n)
        out:     (B, windows, heads, n, d)
    """
    if bias.requires_grad and torch.is_grad_enabled() and q.device.type == "cpu":
        return _Recomputed.apply(q, k, v, bias)
    return _fused(q, k, v, bias)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Call scaled_dot_product_attention once, with windows folded into the batch."""
    b, windows, heads, n, _ = q.shape
    everywhere = bias.unsqueeze(1).expand(b, windows, heads, n, n).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=everywhere
    )
    return out.unflatten(0, (b, windows))


# Number of scores per chunk of the backward pass, small enough to stay in the cache of one core.
CHUNK = 2**20


class _Recomputed(torch.autograd.Function):
    """Attention that recomputes its scores in the backward pass instead of storing them.

    PyTorch's fused CPU kernel does not compute a gradient of the bias. Without this function,
    training would use the unfused kernel and store three (B, windows, heads, n, n) tensors per
    block. The backward pass works in chunks of ``CHUNK`` scores.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        # Detached: PyTorch does not use the fused kernel for a bias that requires a gradient.
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
    """Compute the gradients of q, k, v and bias.

    This is a custom operator because torch.compile cannot trace its loop.
    """
    b, windows, heads, n, d = q.shape
    scale = d**-0.5
    slope = (grad.float() * out.float()).sum(-1, keepdim=True)  # softmax denominator's gradient
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
