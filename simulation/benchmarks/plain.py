"""Reference implementation of the network in mtl_model, the baseline of ``polyclinic bench model``.

It uses textbook PyTorch where mtl_model has a faster form: windows rolled and folded into the
batch, attention computed from separate scores, bias, mask and softmax, maps concatenated before a
convolution, and the last interpolation applied to all channels. It uses the parameters of the
given network (concatenated for a split convolution), so both give the same results, which tests
check. Image sizes must be multiples of the windows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.mtl_model.attention import WindowAttention, offset_index
from polyclinic.mtl_model.blocks import SplitConv
from polyclinic.mtl_model.decoder import Decoder
from polyclinic.mtl_model.network import MultiTaskUNet


def reference_implementation(network: MultiTaskUNet) -> MultiTaskUNet:
    """Copy a network, with its fast forms replaced, in the default memory layout."""
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            for fast, textbook in _PLAIN.items():
                if isinstance(child, fast):
                    setattr(module, name, textbook(child))
    return plain


class PlainAttention(nn.Module):
    """Window attention, step by step as in the paper on the Swin Transformer (Liu et al., 2021).

    Shapes:
        in and out: (B, H, W, C), H and W multiples of the window
    """

    def __init__(self, fast: WindowAttention) -> None:
        super().__init__()
        self.heads, self.window, self.shift = fast.heads, fast.window, fast.shift
        self.qkv, self.bias, self.out = fast.qkv, fast.bias, fast.out

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self._windows(x)  # (B * windows, N, C)
        n = x.shape[1]
        qkv = self.qkv(x).reshape(-1, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # (B * windows, heads, N, d)
        scores = q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)
        scores = scores + self.bias.table[
            :, offset_index(self.window, self.window, self.window, x.device)
        ].unsqueeze(0)
        if self.shift:
            mask = self._mask(h, w).to(x.device)  # (windows, N, N)
            scores = scores.view(b, -1, self.heads, n, n) + mask[:, None]
            scores = scores.view(-1, self.heads, n, n)
        x = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(-1, n, c)
        x = self.out(x)
        side = self.window
        x = x.view(b, h // side, w // side, side, side, c).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, h, w, c)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x

    def _windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        side = self.window
        x = x.view(b, h // side, side, w // side, side, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, c)

    def _mask(self, h: int, w: int) -> Tensor:
        region = torch.zeros(1, h, w, 1)
        edges = (
            slice(0, -self.window),
            slice(-self.window, -self.shift),
            slice(-self.shift, None),
        )
        for i, rows in enumerate(edges):
            for j, columns in enumerate(edges):
                region[:, rows, columns] = 3 * i + j
        windows = self._windows(region).squeeze(-1)  # (windows, N)
        apart = windows.unsqueeze(1) != windows.unsqueeze(2)
        return torch.zeros(apart.shape).masked_fill(apart, -100.0)


class PlainJoined(nn.Module):
    """One convolution of concatenated maps.

    Shapes:
        maps: (B, in_channels[k], H, W)
        out:  (B, out_channels, H, W)
    """

    def __init__(self, fast: SplitConv) -> None:
        super().__init__()
        each = [part.get_parameter("weight").detach() for part in fast.parts]
        weight = torch.cat(each, dim=1)
        self.conv = nn.Conv2d(
            weight.shape[1], weight.shape[0], weight.shape[2], padding="same", bias=False
        )
        self.conv.weight = nn.Parameter(weight.contiguous())

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.conv(torch.cat(list(maps), dim=1))


class PlainDecoder(nn.Module):
    """Decoder that interpolates its features before it computes logits.

    Shapes:
        maps: as in ``Decoder``
        out:  (B, mask_channels, H, W)
    """

    def __init__(self, fast: Decoder) -> None:
        super().__init__()
        self.stages, self.mask, self.stride = fast.stages, fast.mask, fast.stride

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *skips, x = maps
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        x = F.interpolate(x, scale_factor=self.stride, mode="bilinear", align_corners=False)
        return self.mask(x)


_PLAIN = {
    WindowAttention: PlainAttention,
    SplitConv: PlainJoined,
    Decoder: PlainDecoder,
}
