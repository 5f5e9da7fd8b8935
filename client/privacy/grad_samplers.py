"""Per-example gradients of the layers for which Opacus has no rule of its own, or a wrong one.

Importing this module registers them. Each rule gets a layer, what it was called with and the
gradient of its output, and returns for each parameter a gradient with examples in front. tests/
test_per_example_gradients.py holds all of them, and every other layer of the network, against
gradients of one example at a time.
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
    """The parameter is its output.

    Shapes:
        backprops: (B, 1)
    """
    return {layer.value: backprops}


def convolution(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> GradSamples:
    """Each patch of the input with the output pixel that it gave.

    In place of Opacus's own rule (1.6), which reads its input by strides that only contiguous
    tensors have: for one in channels_last order its gradients are of other pixels.

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
    """Each input pixel with the patch of the output that it was spread over.

    Shapes:
        activations: (B, C_in, H, W)
        backprops:   (B, C_out, H', W')

    Raises:
        NotImplementedError: for groups, which no network here has.
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
