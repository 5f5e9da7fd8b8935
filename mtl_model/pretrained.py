"""Pretrained weights for the convolutional path, loaded completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import timm
from timm.models import adapt_input_conv
from torch import Tensor, nn

from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.backbone import build_conv_path, names_of_path, timm_model
from polyclinic.mtl_model.blocks import norm_layer
from polyclinic.mtl_model.network import MultiTaskUNet

PRETRAINED_CHANNELS = 3  # channels of the images that published weights were trained on
_SHOWN = 5  # maximum number of tensors listed in a message


class PretrainedError(ValueError):
    """Pretrained weights cannot be used. The message lists the names and shapes that do not fit."""


def load_pretrained(
    network: MultiTaskUNet, config: ModelConfig, in_channels: int, state: Mapping[str, Tensor]
) -> None:
    """Load pretrained backbone weights into a network's convolutional path.

    The first convolution is adapted to the number of image channels (summed for one channel,
    repeated and scaled for more than three). In a network with group norm, only the scale and shift
    of batch norms are used; their running statistics have no counterpart.

    Args:
        network: the network to load into.
        config: the settings that the network was built with.
        in_channels: channels of the network's images.
        state: state dict of the timm model, with or without its classifier. The names of another
            implementation are accepted if its tensors have timm's kinds (weight, running_mean, ...)
            and shapes in timm's order.

    Raises:
        PretrainedError: if a tensor is missing, of a different shape, not finite or unexpected, or
            if it cannot be determined how the pretrained network pads its convolutions.
    """
    model = timm_model(config.backbone, PRETRAINED_CHANNELS, config.width, config.depths)
    state = _in_timms_names(state, model, config.backbone)
    state = _adapted(state, _first_conv(model), in_channels)
    model = timm_model(config.backbone, in_channels, config.width, config.depths)
    needed = [
        name
        for name in names_of_path(model, config.backbone)
        if not name.endswith("num_batches_tracked")
        and not (config.norm == "group" and name.endswith(("running_mean", "running_var")))
    ]
    own = model.state_dict()
    _check(state, own, needed, _beyond(state, model, config.backbone), config.backbone)
    path = build_conv_path(
        config.backbone,
        in_channels,
        config.stride,
        norm_layer(config.norm) if config.norm == "group" else None,
        config.width,
        config.depths,
        weights={**own, **{name: state[name] for name in needed}},
    )
    network.encoder.cnn.load_state_dict(path.state_dict())


def _in_timms_names(
    state: Mapping[str, Tensor], model: nn.Module, backbone: str
) -> dict[str, Tensor]:
    """Rename entries to timm's names if only the names differ.

    The prefix that PyTorch's data-parallel training adds is removed.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = model.state_dict()
    if set(state) & set(own) or _kinds(state) != _kinds(own):
        return state
    if timm.is_model(f"tf_{backbone}"):
        raise PretrainedError(
            f"model.pretrained: expected the names of timm's {backbone} ({next(iter(own))}, ...), "
            f"got those of another implementation ({next(iter(state))}, ...), which may pad its "
            f"convolutions as TensorFlow does; for weights trained with TensorFlow's padding, set "
            f"model.backbone to tf_{backbone}"
        )
    return dict(zip(own, state.values(), strict=True))


def _kinds(state: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    """List each tensor's kind (weight, running_mean, ...) and shape, in order."""
    return [(name.rpartition(".")[2], tuple(tensor.shape)) for name, tensor in state.items()]


def _first_conv(model: nn.Module) -> str:
    """Return the name of the first convolution's weight."""
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return f"{first}.weight"


def _adapted(state: dict[str, Tensor], name: str, in_channels: int) -> dict[str, Tensor]:
    weight = state.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] != PRETRAINED_CHANNELS:
        return state
    return {**state, name: adapt_input_conv(in_channels, weight)}


def _beyond(state: Mapping[str, Tensor], model: nn.Module, backbone: str) -> list[str]:
    """List entries under the path's modules that the model lacks, as from a deeper network."""
    known = set(model.state_dict())
    roots = {name.partition(".")[0] for name in names_of_path(model, backbone)}
    return [
        name
        for name in state
        if name not in known
        and name.partition(".")[0] in roots
        and not name.endswith("num_batches_tracked")
    ]


def _check(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    needed: Sequence[str],
    beyond: Sequence[str],
    backbone: str,
) -> None:
    problems = [f"{name}: expected nothing, got {tuple(state[name].shape)}" for name in beyond]
    problems += [
        f"{name}: expected finite values, got NaN or infinity"
        for name in needed
        if name in state and not state[name].isfinite().all()
    ]
    problems += [
        f"{name}: expected {tuple(own[name].shape)}, "
        f"got {tuple(state[name].shape) if name in state else 'nothing'}"
        for name in needed
        if name not in state or state[name].shape != own[name].shape
    ]
    if not problems:
        return
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    unknown = [f"{name} {tuple(t.shape)}" for name, t in state.items() if name not in own]
    raise PretrainedError(
        f"model.pretrained: {len(problems)} tensors do not match the {len(needed)} of {backbone}: "
        f"{'; '.join(problems[:_SHOWN])}{more}. Names unknown to {backbone}: "
        f"{', '.join(unknown[:_SHOWN]) or 'none'}"
    )
