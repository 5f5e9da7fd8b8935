"""The exportable form of the network matches the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyclinic.mtl_model.attention import WindowAttention
from polyclinic.mtl_model.network import network_of
from polyclinic.mtl_model.portable import PortableAttention, portable_form

# larger and smaller than the windows below, multiples of them or not, single rows and columns
SIZES = [(1, 1), (1, 9), (2, 3), (3, 10), (4, 4), (5, 2), (7, 6), (8, 8), (11, 1), (12, 13)]


def attention(window: int, shift: int) -> WindowAttention:
    torch.manual_seed(window)
    fast = WindowAttention(channels=8, heads=2, window=window, shift=shift)
    nn.init.normal_(fast.bias.table)  # initial biases are too small to distinguish positions
    return fast


@pytest.mark.parametrize(
    ("window", "shift"), [(1, 0), (2, 0), (2, 1), (3, 1), (4, 0), (4, 2), (5, 2), (7, 3)]
)
@torch.no_grad()
def test_portable_attention_matches_window_attention(window: int, shift: int) -> None:
    fast = attention(window, shift)
    portable = PortableAttention(fast)
    for size in SIZES:
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(portable(x), fast(x), msg=lambda m, at=size: f"{at}: {m}")


@torch.no_grad()
def test_portable_attention_with_and_without_shift_differ() -> None:
    """Negative control: other windows give different outputs with the same weights."""
    shifted, straight = attention(4, 2), attention(4, 0)
    straight.load_state_dict(shifted.state_dict())
    x = torch.randn(1, 8, 8, 8)
    assert (PortableAttention(shifted)(x) - straight(x)).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (16, 90), (5, 7)])
@torch.no_grad()
def test_portable_form_matches_and_leaves_the_network_unchanged(tiny, size) -> None:
    config = tiny(model__swin_depth=2)
    network = network_of(config.model, config.data, config.loss, seed=0)
    portable = portable_form(network)
    assert network.training
    assert any(isinstance(module, WindowAttention) for module in network.modules())
    images = torch.randn(2, 1, *size)
    expected = network.eval()(images)
    masks, classes = portable(images)
    torch.testing.assert_close(masks, expected.mask_logits)
    torch.testing.assert_close(classes, expected.class_logits)
