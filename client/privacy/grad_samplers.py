"""Per-example gradient rules for layers that Opacus does not support or gets wrong.

Importing this module registers the rules. Each rule receives a layer, its inputs and the gradient
of its output, and returns one gradient per parameter, with the examples as first dimension.
tests/client/privacy/test_grad_samplers.py compares these rules, and those of every other layer of
the network, with gradients of one example at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from opacus.grad_sample.utils import register_grad_sampler
from torch import Tensor, nn

from polyclinic.mtl_model.attention import RelativePositionBias
from polyclinic.mtl_model.uncertainty import LogVariance

GradSamples = dict[Tensor, Tensor]


def relative_position_bias(
    layer: RelativePositionBias, activations: list[Tensor], backprops: Tensor
) -> GradSamples:
    """Sum over the pairs of tokens that share an entry of the table.

    Shapes:
        activations: index (n, n) and examples (B, ...)
        backprops:   (B, heads, n, n)
    """
    index, _ = activations
    b, heads = backprops.shape[:2]
    grad = backprops.new_zeros(b, heads, layer.table.shape[1])
    return {layer.table: grad.index_add_(2, index.flatten(), backprops.flatten(2))}


def log_variance(layer: LogVariance, _activations: list[Tensor], backprops: Tensor) -> GradSamples:
    """Return the output's gradient unchanged, since the output is the parameter itself.

    Shapes:
        backprops: (B, 1)
    """
    return {layer.value: backprops}


def convolution(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> GradSamples:
    """Multiply each input patch with the gradient of its output pixel.

    Replaces Opacus's own rule (1.6), which assumes the strides of a contiguous input: for a tensor
    in channels_last order it reads the wrong pixels.

    Shapes:
        activations: (B, C_in, H, W)
        backprops:   (B, C_out, H', W')
    """
    grads: GradSamples = {}
    if layer.weight.requires_grad:
        patches = F.unfold(
            activations[0].to(backprops.dtype),
            kernel_size=layer.kernel_size,
            dilation=layer.dilation,
            padding=_numbers(layer.padding),
            stride=layer.stride,
        )  # (B, C_in * kernel, H' * W')
        pairs = torch.einsum(
            "bgop,bgip->bgoi",
            backprops.flatten(2).unflatten(1, (layer.groups, -1)),
            patches.unflatten(1, (layer.groups, -1)),
        )
        grads[layer.weight] = pairs.reshape(-1, *layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        grads[layer.bias] = backprops.sum(dim=(2, 3))
    return grads


def _numbers(padding: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(padding, str):
        raise NotImplementedError(f"per-example gradients for padding {padding!r}")
    return padding


def transposed_convolution(
    layer: nn.ConvTranspose2d, activations: list[Tensor], backprops: Tensor
) -> GradSamples:
    """Multiply each input pixel with the gradient of the output patch that it contributes to.

    Shapes:
        activations: (B, C_in, H, W)
        backprops:   (B, C_out, H', W')

    Raises:
        NotImplementedError: if the layer has groups, which no network of this project has.
    """
    if layer.groups != 1:
        raise NotImplementedError(f"per-example gradients for {layer.groups} groups")
    grads: GradSamples = {}
    if layer.weight.requires_grad:
        patches = F.unfold(
            backprops,
            kernel_size=layer.kernel_size,
            dilation=layer.dilation,
            padding=_numbers(layer.padding),
            stride=layer.stride,
        )  # (B, C_out * kernel, H * W)
        pairs = torch.einsum("bip,bop->bio", activations[0].to(backprops.dtype).flatten(2), patches)
        grads[layer.weight] = pairs.reshape(-1, *layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        grads[layer.bias] = backprops.sum(dim=(2, 3))
    return grads


_RULES = {
    RelativePositionBias: relative_position_bias,
    LogVariance: log_variance,
    nn.Conv2d: convolution,
    nn.ConvTranspose2d: transposed_convolution,
}
for _layer, _rule in _RULES.items():
    register_grad_sampler(_layer)(_rule)
