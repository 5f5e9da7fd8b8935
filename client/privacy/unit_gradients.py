"""What each unit (an example, or a patient) adds to a step's gradient: its norm, its clipped part.

Two ways to the same numbers:

- ``HookedUnits``: every example's gradient of every parameter, from Opacus's hooks. Simple, and
  as large as the network times the examples of a pass.
- ``GhostUnits``: a layer's gradient is a sum over places (pixels, tokens) of what came in times
  what went back, so its norm follows from inner products between places, without the gradient
  itself (Goodfellow, 2015; Li et al., "Large Language Models Can Be Strong Differentially Private
  Learners", 2021). That pays where places are few and the weight is large: the deep half of a
  network, nearly all of its parameters (Bu et al., "Scalable and Efficient Training of Large
  Convolutional Neural Networks with Differential Privacy", 2022). What came in and went back is
  kept, and one ordinary weight gradient of what went back, scaled by each unit's clipping factor,
  gives the clipped sum, with one backward pass (Bu et al., "Differentially Private Optimization on
  Large Model at Small Cost", 2023). Shallow layers, with many places and small weights, have one
  gradient a unit computed at once by the layer's own kernel. What differs from the papers: units
  of several examples, whose places are taken together.

tests/client/privacy/test_unit_gradients.py holds the two against each other and against one unit at
a time.
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
    """A network whose backward pass tells units apart."""

    def forward(self, images: Tensor, *arguments: Any) -> Any:  # noqa: ANN401
        """Call the network."""

    def backward(self, loss: Tensor, unit: Tensor, alone: bool = False) -> None:
        """Take each unit's part of a pass of ``forward``.

        Args:
            loss: of all its examples, summed.
            alone: the one unit of this pass goes on in the next one.

        Shapes:
            unit: (B,), 0 to U - 1 in order
        """

    def clip(self, clip_norm: float, sums: Sums) -> Tensor:
        """Bring what each unit added since the last time to a norm, and add that to the sums.

        A unit whose gradient is not finite has no norm, and adds nothing.

        Returns:
            (U,) their norms before; not finite where there is none.
        """


@contextmanager
def units_of_network(
    kind: Way,
    network: nn.Module,
    trained: Sequence[nn.Parameter],
) -> Iterator[Units]:
    """Watch a network's passes; afterwards it is an ordinary one again.

    Args:
        kind: functorch is hooks by Opacus's general rule, for comparison.
        trained: parameters whose gradients are wanted; all must require one.
    """
    with warnings.catch_warnings():
        # of the first layer, whose input, an image, wants no gradient
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
    """What to scale each unit with, (U,), and which have a norm at all, (U,)."""
    finite = norms.isfinite()
    factors = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(finite, factors, torch.zeros_like(factors)), finite


def _spans(unit: Tensor) -> list[slice]:
    """Where each unit's examples lie."""
    ends = torch.bincount(unit).cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _by_unit(each: Tensor, spans: Sequence[slice]) -> Tensor:
    """Sum over each unit's examples: (B, ...) to (U, ...)."""
    if len(spans) == len(each):
        return each.float()
    return torch.stack([each[span].float().sum(0) for span in spans])


class _Stored:
    """Gradients a unit, one tensor a parameter: (U, ...)."""

    def __init__(self) -> None:
        self.of: dict[nn.Parameter, Tensor] = {}

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        before = self.of.get(parameter)
        self.of[parameter] = gradient if before is None else before + gradient

    def squares(self) -> Tensor:
        """(U,) squared norms over all parameters."""
        return torch.stack([g.flatten(1).square().sum(1) for g in self.of.values()]).sum(0)

    def add_to(self, sums: Sums, factors: Tensor, finite: Tensor) -> None:
        whole = bool(finite.all())
        for parameter, gradient in self.of.items():
            if not whole:  # 0 times infinity is not 0
                gradient = gradient[finite]
            sums[parameter] += torch.einsum(
                "u,u...->...", factors if whole else factors[finite], gradient
            )
        self.of = {}


class HookedUnits:
    """By Opacus: a gradient of every example, added up by unit."""

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

    def backward(self, loss: Tensor, unit: Tensor, alone: bool = False) -> None:
        loss.backward()
        spans = _spans(unit)
        for parameter in self.trained:
            each = getattr(parameter, "grad_sample", None)
            if each is not None:  # a part of the network that this pass did not use has none
                self.stored.add(parameter, _by_unit(each, spans))
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]

    def clip(self, clip_norm: float, sums: Sums) -> Tensor:
        if not self.stored.of:
            return torch.empty(0)
        norms = self.stored.squares().sqrt()
        self.stored.add_to(sums, *_factors(norms, clip_norm))
        return norms


Placed = nn.Linear | nn.Conv2d  # of which places can be laid out
Weighted = Placed | nn.Conv1d | nn.ConvTranspose2d
Norm = nn.GroupNorm | nn.LayerNorm


Layer = TypeVar("Layer", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class _Call(Generic[Layer]):
    """One call of a layer in a forward pass."""

    layer: Layer
    inputs: list[Tensor]
    versions: list[int]  # of the inputs, which nobody may have written into since

    @classmethod
    def of(cls, layer: Layer, inputs: tuple[Any, ...]) -> _Call[Layer]:  # type: ignore[misc]
        tensors = [x.detach() for x in inputs if isinstance(x, Tensor)]
        return cls(layer, tensors, [x._version for x in tensors])

    @property
    def x(self) -> Tensor:
        """What came in; of layers that know of one input."""
        return self.inputs[0]

    def check(self) -> None:
        if [x._version for x in self.inputs] != self.versions:
            raise RuntimeError(
                f"{type(self.layer).__name__}: its input was written into before the backward "
                "pass, and its units' gradients would be wrong; use privacy.gradients = 'hooks'"
            )


class GhostUnits:
    """By norms without gradients where that pays, and by one gradient a unit elsewhere.

    Layers of PyTorch's own kinds are handled here, their parameters out of autograd's reach, which
    would compute the unclipped sum for nothing. Any other is left to Opacus's rules.
    """

    def __init__(self, network: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        self.network = network
        self.trained: set[nn.Parameter] = set(trained)
        self.stored = _Stored()
        self._squares: list[Tensor] = []  # of layers without stored gradients, (U,) each
        self._kept: list[tuple[_Call[Placed], Tensor]] = []  # those layers, and what went back
        self._unit = torch.empty(0)
        self._spans: list[slice] = []
        self._alone = False
        self._calls: dict[nn.Module, int] = {}
        self._hooks: list[RemovableHandle] = []
        self._off: list[nn.Parameter] = []  # that autograd does not see for the time being
        for layer in network.modules():
            own = [p for p in layer.parameters(recurse=False) if p in self.trained]
            if own:
                self._hooks.append(layer.register_forward_hook(self._called))
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

    def backward(self, loss: Tensor, unit: Tensor, alone: bool = False) -> None:
        self._unit, self._spans, self._alone = unit, _spans(unit), alone
        loss.backward()
        for parameter in self.trained:
            parameter.grad = None  # of layers that Opacus's rules are for

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

    def _called(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            call = _Call.of(layer, inputs)
            self._calls[layer] = self._calls.get(layer, 0) + 1
            output.register_hook(lambda backprops: self._came_back(call, backprops))

    def _came_back(self, call: _Call[nn.Module], backprops: Tensor) -> None:
        call.check()
        layer, backprops = call.layer, backprops.detach()
        wanted: set[nn.Parameter] = {
            p for p in layer.parameters(recurse=False) if p in self.trained
        }
        if _has_places(layer) and self._norm_is_enough(layer, backprops, wanted):
            squares = _squares_of_weight(layer, call.x, backprops, self._spans)
            self._squares.append(squares)
            self._kept.append((_Call(layer, call.inputs, call.versions), backprops))
            wanted.discard(_weight(layer))
        for parameter, gradient in self._of_units(call, backprops, wanted).items():
            self.stored.add(parameter, gradient)

    def _norm_is_enough(self, layer: Placed, backprops: Tensor, wanted: set[nn.Parameter]) -> bool:
        """Whether inner products between places cost less than the weight's gradients."""
        one_use = self._calls[layer] == 1 and not self._alone  # two uses' products have cross terms
        if not one_use or _weight(layer) not in wanted:
            return False
        outs, ins = layer.weight.shape[0], layer.weight[0].numel()
        most = max(span.stop - span.start for span in self._spans)
        positions = most * backprops[0].numel() // outs
        return positions * (ins + outs) < ins * outs

    def _of_units(
        self, call: _Call[nn.Module], backprops: Tensor, wanted: set[nn.Parameter]
    ) -> dict[nn.Parameter, Tensor]:
        """Each unit's gradient: (U, ...) a parameter."""
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
        if _has_places(layer) and _few_places(layer, backprops):
            each = _examples_by_places(layer, x, backprops)
            return {p: _by_unit(each[p], self._spans) for p in wanted}
        weighted = cast(Weighted, layer)
        parts = [_gradients(weighted, x[span], backprops[span], wanted) for span in self._spans]
        return {p: torch.stack([part[p].float() for part in parts]) for p in wanted}


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its class says, with zeros as its padding."""
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, nn.GroupNorm, nn.LayerNorm)


def _has_places(layer: nn.Module) -> TypeGuard[Placed]:
    """Whether its weight's gradient is a sum over places, and this module can lay them out."""
    plain_convolution = type(layer) is nn.Conv2d and layer.groups == 1
    return _is_plain(layer) and (type(layer) is nn.Linear or plain_convolution)


def _weight(layer: Weighted) -> nn.Parameter:
    return cast(nn.Parameter, layer.weight)  # torch says Tensor


def _gradients(
    layer: Weighted, x: Tensor, backprops: Tensor, wanted: set[nn.Parameter]
) -> dict[nn.Parameter, Tensor]:
    """The gradient of these examples together, by the layer's own kernel.

    Args:
        wanted: some of the layer's parameters.
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


def _few_places(layer: Placed, backprops: Tensor) -> bool:
    """Whether a product of matrices is quicker than one call of the layer's kernel an example."""
    positions = backprops[0].numel() // layer.weight.shape[0]
    return isinstance(layer, nn.Linear) or positions < layer.weight[0].numel()


def _examples_by_places(layer: Placed, x: Tensor, backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Each example's gradient of weight and bias: (B, ...)."""
    ins, outs = _places(layer, x, backprops)
    weight, bias = _weight(layer), cast(nn.Parameter | None, layer.bias)
    found = {weight: (outs.mT @ ins).reshape(-1, *weight.shape)}
    if bias is not None:
        found[bias] = outs.sum(1)
    return found


def _examples_of_norm(layer: Norm, x: Tensor, backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Each example's gradient of scale and shift: (B, ...)."""
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
    layer: Placed, x: Tensor, backprops: Tensor, spans: Sequence[slice]
) -> Tensor:
    """(U,) squared norms of the weight's gradient, rounding included: never below the true ones.

    The gradient is the sum over places s of b_s a_s^T, so its squared norm is the sum over pairs
    (s, t) of (a_s . a_t)(b_s . b_t). Where places nearly cancel, rounding is large beside what is
    left; its bound, relative to (sum over s of |a_s| |b_s|)^2, is added.
    """
    ins, outs = _places(layer, x.float(), backprops.float())
    slack = 4 * torch.finfo(ins.dtype).eps * max(ins.shape[2], outs.shape[2]) ** 0.5

    def of(ins: Tensor, outs: Tensor) -> Tensor:
        """(B,) from (B, places, channels) twice."""
        a, b = ins @ ins.mT, outs @ outs.mT
        lengths = (a.diagonal(dim1=1, dim2=2) * b.diagonal(dim1=1, dim2=2)).clamp(min=0).sqrt()
        return (a * b).sum((1, 2)) + slack * lengths.sum(1).square()

    if len(spans) == len(ins):
        return of(ins, outs)
    together = [of(ins[s].flatten(0, 1)[None], outs[s].flatten(0, 1)[None]) for s in spans]
    return torch.cat(together)


def _places(layer: Placed, x: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor]:
    """What came in and what went back, place by place: (B, places, channels) each."""
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
    )  # (B, channels * kernel, places)
    return patches.mT, backprops.flatten(2).mT
