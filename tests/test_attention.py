"""Window attention against the plain form: every token attends to its window, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_model.attention import SwinLayer, WindowAttention


def plain(attention: WindowAttention, x: Tensor) -> Tensor:
    """The same by its definition: which window a token is in, token by token, one example."""
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
def test_windows_cut_and_masked_equal_the_definition(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(channels=8, heads=2, window=4, shift=shift)
    torch.nn.init.normal_(attention.bias.table)
    x = torch.randn(2, *size, 8)
    with torch.no_grad():
        ours = attention(x)
        for example in range(2):
            torch.testing.assert_close(ours[example], plain(attention, x[example]))


def test_a_map_of_one_window_is_not_shifted() -> None:
    def layer(side: int) -> SwinLayer:
        return SwinLayer(8, 2, window=4, side=side, mlp_ratio=2.0, drop_paths=[0.0, 0.0])

    assert [block.attention.shift for block in layer(4).blocks] == [0, 0]
    assert [block.attention.shift for block in layer(8).blocks] == [0, 2]
    assert [block.attention.window for block in layer(2).blocks] == [2, 2]
