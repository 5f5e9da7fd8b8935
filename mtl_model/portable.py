"""A form of the network that can be exported as one graph for all image sizes.

Window attention (attention.py) cuts a map into rectangles with Python integers, and the network
pads images only if necessary, so a traced graph of either is valid only for the traced size. This
module implements the same computation without branches or loops that depend on sizes. It uses the
network's own parameters; tests check that both forms give the same results.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyclinic.mtl_model.attention import WindowAttention, offset_index
from polyclinic.mtl_model.network import MultiTaskUNet


def portable_form(network: MultiTaskUNet) -> PortableNetwork:
    """Copy a network into an exportable form in evaluation mode, on the CPU."""
    portable = copy.deepcopy(network).cpu()
    for module in list(portable.modules()):
        for name, child in module.named_children():
            if isinstance(child, WindowAttention):
                setattr(module, name, PortableAttention(child))
            elif isinstance(child, nn.GroupNorm):
                setattr(module, name, PortableGroupNorm(child))
    return PortableNetwork(portable).eval()


class PortableNetwork(nn.Module):
    """Exportable network that returns the logits of both tasks as a pair.

    Shapes:
        in:  (B, in_channels, H, W), float, any H and W
        out: mask logits, (B, M, H, W) or (B, M + 1, H, W), and class logits, (B, K)
    """

    def __init__(self, network: MultiTaskUNet) -> None:
        super().__init__()
        self.encoder, self.dfe = network.encoder, network.dfe
        self.decoder, self.head = network.decoder, network.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h, w = images.shape[2], images.shape[3]
        side = self.encoder.stride
        below, right = _whole(h, side) - h, _whole(w, side) - w
        maps = self.encoder(F.pad(images, (0, right, 0, below)))
        enhanced = [dfe(m) for dfe, m in zip(self.dfe, maps, strict=True)]
        return self.decoder(enhanced)[:, :, :h, :w], self.head(maps)


class PortableGroupNorm(nn.Module):
    """Group norm that averages one axis at a time.

    Some inference engines sum a group sequentially in float32. For the many pixels of a large map
    this loses two decimal digits, and more if most of an image is black.

    Shapes:
        in and out: (B, C, H, W)
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (self.groups, -1))  # (B, groups, C / groups, H, W)
        centred = parts - _mean(parts)
        out = (centred / torch.sqrt(_mean(centred * centred) + self.eps)).flatten(1, 2)
        return out * self.weight[:, None, None] + self.bias[:, None, None]


def _mean(parts: Tensor) -> Tensor:
    """Average each group: (B, groups, C / groups, H, W) to (B, groups, 1, 1, 1)."""
    return parts.mean(4, keepdim=True).mean(3, keepdim=True).mean(2, keepdim=True)


class PortableAttention(nn.Module):
    """Window attention on a map padded to a whole number of windows.

    The windows are at the same positions as in ``WindowAttention``: the first one ends after
    ``shift`` tokens, so ``window - shift`` tokens of padding precede the map. Padding is masked.

    Shapes:
        in and out: (B, H, W, C), any H and W
    """

    outside: Tensor
    bias: Tensor

    def __init__(self, fast: WindowAttention) -> None:
        super().__init__()
        self.heads, self.window = fast.heads, fast.window
        self.before = fast.window - fast.shift if fast.shift else 0
        self.qkv, self.out = fast.qkv, fast.out
        index = offset_index(fast.window, fast.window, fast.window, fast.bias.table.device)
        self.register_buffer("bias", fast.bias.table.detach()[:, index])  # (heads, N, N)
        # A buffer, so that it moves with the weights; a traced constant would fix the device.
        self.register_buffer("outside", torch.zeros(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
        side = self.window
        qkv = self._padded(self.qkv(x), 0.0)  # (B, rows * side, columns * side, 3C)
        rows, columns = qkv.shape[1] // side, qkv.shape[2] // side
        cut = qkv.reshape(b, rows, side, columns, side, 3, self.heads, c // self.heads)
        cut = cut.permute(5, 0, 1, 3, 6, 2, 4, 7)
        parts = cut.reshape(3, b, rows * columns, self.heads, side * side, c // self.heads)
        q, k, v = parts[0], parts[1], parts[2]  # (B, windows, heads, N, d)
        unseen = self._padded(self.outside.expand(1, h, w, 1), float("-inf"))
        unseen = unseen.reshape(rows, side, columns, side).permute(0, 2, 1, 3)
        unseen = unseen.reshape(rows * columns, 1, 1, side * side)
        scores = q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1) + self.bias + unseen
        out = torch.softmax(scores, dim=-1) @ v
        out = out.reshape(b, rows, columns, self.heads, side, side, c // self.heads)
        out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, rows * side, columns * side, c)
        return self.out(out[:, self.before : self.before + h, self.before : self.before + w])

    def _padded(self, x: Tensor, value: float) -> Tensor:
        """Pad a map to whole windows: (B, rows * window, columns * window, channels)."""
        h, w = x.shape[1] + self.before, x.shape[2] + self.before
        below, right = _whole(h, self.window) - h, _whole(w, self.window) - w
        return F.pad(x, (0, 0, self.before, right, self.before, below), value=value)


def _whole(length: int, side: int) -> int:
    """Round up to a multiple of ``side``, as a product that torch.export knows to be divisible."""
    return (length + side - 1) // side * side
