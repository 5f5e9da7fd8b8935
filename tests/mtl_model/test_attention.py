"""Window attention against a reference that handles every pair of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyclinic.mtl_model.attention as attention_module
import polyclinic.mtl_model.attention_kernel as kernel_module
from polyclinic.mtl_model.attention import WindowAttention, offset_index, window_bands
from polyclinic.mtl_model.encoder import heads_of
from polyclinic.mtl_model.swin import SwinLayer


def plain(attention: WindowAttention, x: Tensor) -> Tensor:
    """Compute window attention of one example by definition, token by token."""
    h, w, c = x.shape
    side, shift, heads = attention.window, attention.shift, attention.heads
    qkv = attention.qkv(x).view(h, w, 3, heads, c // heads)
    out = torch.zeros(h, w, heads, c // heads)

    def window(row: int, column: int) -> tuple[int, int]:
        return (row + side - shift) // side, (column + side - shift) // side

    tokens = [(i, j) for i in range(h) for j in range(w)]
    for i, j in tokens:
        near = [t for t in tokens if window(*t) == window(i, j)]
        keys = torch.stack([qkv[a, b, 1] for a, b in near])  # (tokens, heads, d)
        values = torch.stack([qkv[a, b, 2] for a, b in near])
        offset = [(i - a + side - 1) * (2 * side - 1) + (j - b + side - 1) for a, b in near]
        scores = torch.einsum("hd,nhd->hn", qkv[i, j, 0], keys) / (c // heads) ** 0.5
        weight = torch.softmax(scores + attention.bias.table[:, offset], dim=1)
        out[i, j] = torch.einsum("hn,nhd->hd", weight, values)
    return attention.out(out.view(h, w, c))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (6, 9), (3, 8)])
def test_window_attention_matches_the_definition(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(channels=8, heads=2, window=4, shift=shift)
    torch.nn.init.normal_(attention.bias.table)
    x = torch.randn(2, *size, 8)
    with torch.no_grad():
        ours = attention(x)
        for example in range(2):
            torch.testing.assert_close(ours[example], plain(attention, x[example]))


@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_recomputed_chunked_gradients_match_kept_scores(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(channels=8, heads=2, window=4, shift=2)
    torch.nn.init.normal_(attention.bias.table)
    x = torch.randn(2, *size, 8, requires_grad=True)

    def gradients(chunk: int | None) -> list[Tensor]:
        if chunk:
            monkeypatch.setattr(kernel_module, "CHUNK", chunk)
        else:
            monkeypatch.setattr(attention_module, "windowed_attention", kernel_module._fused)
        loss = attention(x).square().sum()
        return list(torch.autograd.grad(loss, [x, *attention.parameters()]))

    recomputed = [gradients(chunk) for chunk in (1, 1000, 2**20)]
    kept = gradients(None)
    for found in recomputed:
        for ours, expected in zip(found, kept, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "shift", "cut"),
    [
        (8, 4, 0, [(0, 4, 2)]),
        (8, 4, 2, [(0, 2, 1), (2, 4, 1), (6, 2, 1)]),
        (9, 4, 2, [(0, 2, 1), (2, 4, 1), (6, 3, 1)]),
        (9, 4, 0, [(0, 4, 2), (8, 1, 1)]),
        (3, 4, 0, [(0, 3, 1)]),
        (3, 4, 2, [(0, 2, 1), (2, 1, 1)]),
        (1, 4, 2, [(0, 1, 1)]),
    ],
)
def test_window_bands_cut_at_the_shift_and_at_every_window(
    length: int, window: int, shift: int, cut: list[tuple[int, int, int]]
) -> None:
    assert [(s.start, s.size, s.count) for s in window_bands(length, window, shift)] == cut


def test_map_of_one_window_is_not_shifted() -> None:
    def layer(side: int) -> SwinLayer:
        return SwinLayer(
            8, 2, window=4, side=side, mlp_ratio=2.0, drop_paths=[0.0, 0.0], token_mixing="proper"
        )

    assert [block.attention.shift for block in layer(4).blocks] == [0, 0]
    assert [block.attention.shift for block in layer(8).blocks] == [0, 2]
    assert [block.attention.window for block in layer(2).blocks] == [2, 2]


@pytest.mark.parametrize(("channels", "heads"), [(64, 2), (24, 1), (112, 2), (320, 10), (16, 1)])
def test_heads_divide_channels_and_respect_the_minimum_size(channels: int, heads: int) -> None:
    assert heads_of(channels, least=32) == heads


def test_attention_trains_after_inference_mode() -> None:
    attention = WindowAttention(channels=8, heads=2, window=5, shift=0)
    with torch.inference_mode():
        attention(torch.randn(1, 5, 5, 8))
    attention(torch.randn(1, 5, 5, 8)).sum().backward()
    assert attention.bias.table.grad is not None


def test_bf16_gradients_match_fp32_up_to_rounding() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(channels=8, heads=2, window=4, shift=2)
    torch.nn.init.normal_(attention.bias.table)
    x = torch.randn(2, 8, 8, 8, requires_grad=True)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = attention(x)
        return list(torch.autograd.grad(out.float().square().sum(), [x, *attention.parameters()]))

    for rounded, exact in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert rounded.dtype == torch.float32
        largest = exact.abs().max().item()
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.03 * largest)
        assert not torch.equal(rounded, exact)


def test_bias_is_expanded_without_a_copy_per_example() -> None:
    attention = WindowAttention(channels=8, heads=2, window=4, shift=0)
    index = offset_index(4, 4, 4, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        bias = attention.bias(index, torch.zeros(5, 1, dtype=dtype))
        assert bias.dtype == dtype
        assert bias.shape == (5, 2, 16, 16)
        assert bias.stride(0) == 0
