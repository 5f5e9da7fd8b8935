"""Per-unit gradient norms and clipped sums for DP-SGD; a unit is an example or a patient.

Two implementations compute the same numbers:

- ``HookedUnits`` computes the gradient of every example and parameter with Opacus's hooks. It is
  simple, but needs memory for the whole network times the examples of a pass.
- ``GhostUnits`` uses that a layer's weight gradient is a sum over positions (pixels, tokens) of
  input times output gradient. Its norm follows from inner products between positions, without the
  gradient itself (Goodfellow, 2015; Li et al., "Large Language Models Can Be Strong Differentially
  Private Learners", 2021). This pays off for few positions and large weights: the deep half of a
  network, with nearly all parameters (Bu et al., "Scalable and Efficient Training of Large
  Convolutional Neural Networks with Differential Privacy", 2022). Inputs and output gradients are
  kept, and one ordinary weight gradient of the output gradients, scaled by each unit's clipping
  factor, gives the clipped sum with a single backward pass (Bu et al., "Differentially Private
  Optimization on Large Model at Small Cost", 2023). Shallow layers, with many positions and small
  weights, compute one gradient per unit with the layer's own kernel. Unlike in the papers, a unit
  may have several examples; their positions are treated as one set.

tests/client/privacy/test_unit_gradients.py compares both with each other and with gradients of one
unit at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import polyclinic.client.privacy.grad_samplers  # noqa: F401 registers the rules that Opacus lacks

Sums = Mapping[nn.Parameter, Tensor]


Way = Literal["ghost", "hooks", "functorch"]


class Units(Protocol):
    """A network with a backward pass that separates the gradients of units."""

    def forward(self, images: Tensor, *arguments: Any) -> Any:  # noqa: ANN401
        """Call the network."""

    def backward(self, loss: Tensor, unit: Tensor, unit_continues: bool = False) -> None:
        """Run the backward pass of the last ``forward`` and keep each unit's gradient.

        Args:
            loss: sum of the losses of all examples.
            unit: each example's unit.
            unit_continues: the pass holds a part of one unit; its other examples come in other
                passes before ``clip``.

        Shapes:
            unit: (B,), values 0 to U - 1 in ascending order
        """

    def clip(self, clip_norm: float, sums: Sums) -> Tensor:
        """Clip the gradients that the units accumulated since the last call; add them to ``sums``.

        A unit with a gradient that is not finite adds nothing.

        Args:
            clip_norm: largest L2 norm of one unit's gradient over all parameters.
            sums: sum of clipped gradients per parameter, changed in place.

        Returns:
            (U,) gradient norms before clipping; not finite if the gradient is not finite.
        """


@contextmanager
def units_of_network(
    kind: Way,
    network: nn.Module,
    trained: Sequence[nn.Parameter],
) -> Iterator[Units]:
    """Attach per-unit gradients to a network; on exit, it is an ordinary network again.

    Args:
        kind: implementation; ``functorch`` is ``hooks`` with Opacus's generic rule for every layer,
            for comparison.
        network: the network.
        trained: trainable parameters; all must have ``requires_grad`` set.
    """
    with warnings.catch_warnings():
        # raised by the first layer, because its input (an image) requires no gradient
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        units = (
            GhostUnits(network, trained)
            if kind == "ghost"
            else HookedUnits(network, trained, functorch=kind == "functorch")
        )
        try:
            yield units
        finally:
            units.close()


def _factors(norms: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Compute the clipping factor of each unit, (U,), and whether its norm is finite, (U,)."""
    finite = norms.isfinite()
    factors = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(finite, factors, torch.zeros_like(factors)), finite


def _spans(unit: Tensor) -> list[slice]:
    """Return the slice of each unit's examples in the batch."""
    ends = torch.bincount(unit).cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _by_unit(each: Tensor, spans: Sequence[slice]) -> Tensor:
    """Sum over the examples of each unit: (B, ...) to (U, ...)."""
    if len(spans) == len(each):
        return each.float()
    return torch.stack([each[span].float().sum(0) for span in spans])


class _Stored:
    """Stored per-unit gradients, one tensor (U, ...) per parameter."""

    def __init__(self) -> None:
        self.of: dict[nn.Parameter, Tensor] = {}

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        before = self.of.get(parameter)
        self.of[parameter] = gradient if before is None else before + gradient

    def squares(self) -> Tensor:
        """Compute the squared norms over all parameters, (U,)."""
        return torch.stack([g.flatten(1).square().sum(1) for g in self.of.values()]).sum(0)

    def add_to(self, sums: Sums, factors: Tensor, finite: Tensor) -> None:
        whole = bool(finite.all())
        for parameter, gradient in self.of.items():
            if not whole:  # a factor of 0 does not remove infinity: 0 * inf is NaN
                gradient = gradient[finite]
            sums[parameter] += torch.einsum(
                "u,u...->...", factors if whole else factors[finite], gradient
            )
        self.of = {}


class HookedUnits:
    """Per-example gradients from Opacus, summed per unit."""

    def __init__(
        self, network: nn.Module, trained: Sequence[nn.Parameter], functorch: bool = False
    ) -> None:
        self.trained = list(trained)
        self.watched = GradSampleModule(network, loss_reduction="sum", force_functorch=functorch)
        self.stored = _Stored()

    def close(self) -> None:
        self.watched.to_standard_module()

    def forward(self, images: Tensor, *arguments: Any) -> Any:  # noqa: ANN401
        return self.watched(images, *arguments)

    def backward(self, loss: Tensor, unit: Tensor, unit_continues: bool = False) -> None:
        loss.backward()
        spans = _spans(unit)
        for parameter in self.trained:
            each = getattr(parameter, "grad_sample", None)
            if each is not None:  # None if this pass did not use the parameter
                self.stored.add(parameter, _by_unit(each, spans))
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]

    def clip(self, clip_norm: float, sums: Sums) -> Tensor:
        if not self.stored.of:
            return torch.empty(0)
        norms = self.stored.squares().sqrt()
        self.stored.add_to(sums, *_factors(norms, clip_norm))
        return norms


LinearOrConv2d = nn.Linear | nn.Conv2d  # layers that _positions can unfold
Weighted = LinearOrConv2d | nn.Conv1d | nn.ConvTranspose2d
Norm = nn.GroupNorm | nn.LayerNorm


Layer = TypeVar("Layer", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class _Call(Generic[Layer]):
    """One call of a layer in a forward pass."""

    layer: Layer
    inputs: list[Tensor]
    versions: list[int]  # version counters of the inputs, to detect in-place writes

    @classmethod
    def of(cls, layer: Layer, inputs: tuple[Any, ...]) -> _Call[Layer]:  # type: ignore[misc]
        tensors = [x.detach() for x in inputs if isinstance(x, Tensor)]
        return cls(layer, tensors, [x._version for x in tensors])

    @property
    def x(self) -> Tensor:
        """The input of a layer with a single input."""
        return self.inputs[0]

    def check(self) -> None:
        if [x._version for x in self.inputs] != self.versions:
            raise RuntimeError(
                f"{type(self.layer).__name__}: its input was modified in place before the backward "
                "pass, so per-unit gradients would be wrong; use privacy.gradients = 'hooks'"
            )


class GhostUnits:
    """Ghost norms where they are cheaper, and one gradient per unit elsewhere.

    PyTorch's own layer types are handled here. Their parameters do not require gradients in the
    meantime, because autograd would compute the unclipped sum for nothing. All other layers use
    Opacus's rules.
    """

    def __init__(self, network: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        self.network = network
        self.trained: set[nn.Parameter] = set(trained)
        self.stored = _Stored()
        # squared norms (U,) of the layers without stored gradients, and for each of these layers
        # its call with the gradient of its output
        self._squares: list[Tensor] = []
        self._kept: list[tuple[_Call[LinearOrConv2d], Tensor]] = []
        self._unit = torch.empty(0)
        self._spans: list[slice] = []
        self._unit_continues = False
        self._calls: dict[nn.Module, int] = {}
        self._hooks: list[RemovableHandle] = []
        self._off: list[nn.Parameter] = []  # parameters with requires_grad off until close()
        for layer in network.modules():
            own = [p for p in layer.parameters(recurse=False) if p in self.trained]
            if own:
                self._hooks.append(layer.register_forward_hook(self._on_forward))
                if _is_plain(layer):
                    self._off += own
        for parameter in self._off:
            parameter.requires_grad_(False)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self._off:
            parameter.requires_grad_(True)

    def forward(self, images: Tensor, *arguments: Any) -> Any:  # noqa: ANN401
        self._calls = {}
        return self.network(images.detach().requires_grad_(), *arguments)

    def backward(self, loss: Tensor, unit: Tensor, unit_continues: bool = False) -> None:
        self._unit, self._spans, self._unit_continues = unit, _spans(unit), unit_continues
        loss.backward()
        for parameter in self.trained:
            parameter.grad = None  # autograd sets it for layers that use Opacus's rules

    def clip(self, clip_norm: float, sums: Sums) -> Tensor:
        squares = ([self.stored.squares()] if self.stored.of else []) + self._squares
        if not squares:
            return torch.empty(0)
        norms = torch.stack(squares).sum(0).clamp(min=0).sqrt()
        factors, finite = _factors(norms, clip_norm)
        self.stored.add_to(sums, factors, finite)
        use = finite[self._unit]
        for call, backprops in self._kept:
            call.check()
            scale = factors[self._unit].view(-1, *[1] * (backprops.dim() - 1))
            x, scaled = call.x.float(), backprops.float() * scale
            if not use.all():
                x, scaled = x[use], scaled[use]
            weight = _weight(call.layer)
            sums[weight] += _gradients(call.layer, x, scaled, {weight})[weight]
        self._squares, self._kept = [], []
        return norms

    def _on_forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            call = _Call.of(layer, inputs)
            self._calls[layer] = self._calls.get(layer, 0) + 1
            output.register_hook(lambda backprops: self._on_backward(call, backprops))

    def _on_backward(self, call: _Call[nn.Module], backprops: Tensor) -> None:
        call.check()
        layer, backprops = call.layer, backprops.detach()
        wanted: set[nn.Parameter] = {
            p for p in layer.parameters(recurse=False) if p in self.trained
        }
        if _sums_over_positions(layer) and self._norm_is_enough(layer, backprops, wanted):
            squares = _squares_of_weight(layer, call.x, backprops, self._spans)
            self._squares.append(squares)
            self._kept.append((_Call(layer, call.inputs, call.versions), backprops))
            wanted.discard(_weight(layer))
        for parameter, gradient in self._of_units(call, backprops, wanted).items():
            self.stored.add(parameter, gradient)

    def _norm_is_enough(
        self, layer: LinearOrConv2d, backprops: Tensor, wanted: set[nn.Parameter]
    ) -> bool:
        """Whether inner products between positions cost less than the weight's gradients."""
        # two uses of a weight would add cross terms to its squared norm
        one_use = self._calls[layer] == 1 and not self._unit_continues
        if not one_use or _weight(layer) not in wanted:
            return False
        outs, ins = layer.weight.shape[0], layer.weight[0].numel()
        most = max(span.stop - span.start for span in self._spans)
        positions = most * backprops[0].numel() // outs
        return positions * (ins + outs) < ins * outs

    def _of_units(
        self, call: _Call[nn.Module], backprops: Tensor, wanted: set[nn.Parameter]
    ) -> dict[nn.Parameter, Tensor]:
        """Compute each unit's gradient, (U, ...) per parameter."""
        layer = call.layer
        if not wanted:
            return {}
        if not _is_plain(layer):
            rule = GradSampleModule.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
            each = rule(layer, call.inputs, backprops)
            return {p: _by_unit(each[p], self._spans) for p in wanted}
        x = call.x.to(backprops.dtype)
        if isinstance(layer, Norm):
            each = _examples_of_norm(layer, x, backprops)
            return {p: _by_unit(each[p], self._spans) for p in wanted}
        if _sums_over_positions(layer) and _few_positions(layer, backprops):
            each = _examples_by_positions(layer, x, backprops)
            return {p: _by_unit(each[p], self._spans) for p in wanted}
        weighted = cast(Weighted, layer)
        parts = [_gradients(weighted, x[span], backprops[span], wanted) for span in self._spans]
        return {p: torch.stack([part[p].float() for part in parts]) for p in wanted}


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of PyTorch's own types (no subclass) with zero padding."""
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, nn.GroupNorm, nn.LayerNorm)


def _sums_over_positions(layer: nn.Module) -> TypeGuard[LinearOrConv2d]:
    """Whether the weight's gradient is a sum over positions that ``_positions`` can unfold."""
    plain_convolution = type(layer) is nn.Conv2d and layer.groups == 1
    return _is_plain(layer) and (type(layer) is nn.Linear or plain_convolution)


def _weight(layer: Weighted) -> nn.Parameter:
    return cast(nn.Parameter, layer.weight)  # torch says Tensor


def _gradients(
    layer: Weighted, x: Tensor, backprops: Tensor, wanted: set[nn.Parameter]
) -> dict[nn.Parameter, Tensor]:
    """Compute the gradient summed over all given examples with the layer's own kernel.

    Args:
        layer: the layer.
        x: its input.
        backprops: gradient of its output.
        wanted: the parameters of the layer to compute gradients for.
    """
    weight, bias = _weight(layer), cast(nn.Parameter | None, layer.bias)
    found: dict[nn.Parameter, Tensor] = {}
    if weight in wanted and isinstance(layer, nn.Linear):
        rows = backprops.reshape(-1, weight.shape[0])
        found[weight] = rows.T @ x.reshape(-1, weight.shape[1])
    elif weight in wanted:
        transposed = isinstance(layer, nn.ConvTranspose2d)
        _, found[weight], _ = torch.ops.aten.convolution_backward(
            backprops,
            x,
            weight.detach().to(x.dtype),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            transposed,
            layer.output_padding,
            layer.groups,
            (False, True, False),
        )
    if bias is not None and bias in wanted:
        channel = backprops.dim() - 1 if isinstance(layer, nn.Linear) else 1
        found[bias] = backprops.sum([d for d in range(backprops.dim()) if d != channel])
    return found


def _few_positions(layer: LinearOrConv2d, backprops: Tensor) -> bool:
    """Whether one matrix product is faster than one call of the layer's kernel per example."""
    positions = backprops[0].numel() // layer.weight.shape[0]
    return isinstance(layer, nn.Linear) or positions < layer.weight[0].numel()


def _examples_by_positions(
    layer: LinearOrConv2d, x: Tensor, backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Compute each example's gradient of weight and bias, (B, ...)."""
    ins, outs = _positions(layer, x, backprops)
    weight, bias = _weight(layer), cast(nn.Parameter | None, layer.bias)
    found = {weight: (outs.mT @ ins).reshape(-1, *weight.shape)}
    if bias is not None:
        found[bias] = outs.sum(1)
    return found


def _examples_of_norm(layer: Norm, x: Tensor, backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Compute each example's gradient of scale and shift, (B, ...)."""
    if isinstance(layer, nn.GroupNorm):
        normed = F.group_norm(x, layer.num_groups, eps=layer.eps)
        over = list(range(2, x.dim()))
    else:
        normed = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        over = list(range(1, x.dim() - len(layer.normalized_shape)))
    found: dict[nn.Parameter, Tensor] = {}
    for parameter, each in ((layer.weight, backprops * normed), (layer.bias, backprops)):
        if parameter is not None:
            found[parameter] = each.sum(over) if over else each
    return found


def _squares_of_weight(
    layer: LinearOrConv2d, x: Tensor, backprops: Tensor, spans: Sequence[slice]
) -> Tensor:
    """Compute upper bounds of the squared norms of the weight's gradient, (U,).

    The gradient is the sum over positions s of b_s a_s^T, so its squared norm is the sum over pairs
    (s, t) of (a_s . a_t)(b_s . b_t). If positions nearly cancel, the rounding error is large
    relative to the result. A bound of the error, relative to (sum over s of |a_s| |b_s|)^2, is
    added, so that the result is never below the true norm.
    """
    ins, outs = _positions(layer, x.float(), backprops.float())
    slack = 4 * torch.finfo(ins.dtype).eps * max(ins.shape[2], outs.shape[2]) ** 0.5

    def of(ins: Tensor, outs: Tensor) -> Tensor:
        """Compute squared norms (B,) from two tensors (B, positions, channels)."""
        a, b = ins @ ins.mT, outs @ outs.mT
        lengths = (a.diagonal(dim1=1, dim2=2) * b.diagonal(dim1=1, dim2=2)).clamp(min=0).sqrt()
        return (a * b).sum((1, 2)) + slack * lengths.sum(1).square()

    if len(spans) == len(ins):
        return of(ins, outs)
    together = [of(ins[s].flatten(0, 1)[None], outs[s].flatten(0, 1)[None]) for s in spans]
    return torch.cat(together)


def _positions(layer: LinearOrConv2d, x: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    """Unfold input and output gradient by position, (B, positions, channels) each."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]), backprops.reshape(
            len(x), -1, backprops.shape[-1]
        )
    padding = cast(tuple[int, int], layer.padding)
    if (layer.kernel_size, padding, layer.stride) == ((1, 1), (0, 0), (1, 1)):
        return x.flatten(2).mT, backprops.flatten(2).mT
    patches = F.unfold(
        x,
        kernel_size=layer.kernel_size,
        dilation=layer.dilation,
        padding=padding,
        stride=layer.stride,
    )  # (B, channels * kernel, positions)
    return patches.mT, backprops.flatten(2).mT
