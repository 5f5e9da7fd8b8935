"""Summary of a network: parameters, operations and output shapes of each part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.network import MultiTaskUNet, network_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One part of a network, with figures for one image."""

    name: str
    parameters: int
    gmacs: float  # 10^9 multiply-adds of matrix products and convolutions
    outputs: tuple[Shape, ...]  # shapes of the outputs without the batch dimension


@dataclass(frozen=True)
class Summary:
    """The size of a network, in total and by part, with figures for one image."""

    parameters: int
    gmacs: float  # 10^9 multiply-adds of matrix products and convolutions
    state_bytes: int  # uncompressed bytes that a round sends in each direction
    parts: tuple[Part, ...]


def summarise(model: ModelConfig, data: DataConfig, loss: LossConfig) -> Summary:
    """Summarise the network of a run's settings, at the run's image size.

    The network is built on PyTorch's meta device, where tensors have shapes but no data.

    Raises:
        BackboneError: if the configured backbone cannot be used.
    """
    with torch.device("meta"):
        network = network_of(model, data, loss, seed=0).eval()
        image = torch.empty(1, data.channels, data.image_height, data.image_width)
    members = _members(network)
    gmacs, outputs = _counted(network, image, members)
    parts = tuple(
        Part(
            name,
            sum(p.numel() for module in modules for p in module.parameters()),
            sum(gmacs[module] for module in modules),
            tuple(shape for module in modules for shape in outputs.get(module, ())),
        )
        for name, modules in members.items()
    )
    state = network.state_dict().values()
    return Summary(
        sum(p.numel() for p in network.parameters()),
        gmacs[network],
        sum(t.numel() * t.element_size() for t in state),
        parts,
    )


def _members(network: MultiTaskUNet) -> dict[str, list[nn.Module]]:
    encoder = network.encoder
    members = {
        "encoder, CNN": [encoder.cnn.stem, *encoder.cnn.stages],
        "encoder, token entry": [*encoder.tokens],
        "encoder, transformer": [*encoder.swins],
        "DFE": [*network.dfe],
        "decoder": [network.decoder],
        "head": [network.head],
    }
    if network.uncertainty is not None:
        members["task weights"] = [network.uncertainty]
    return members


def _counted(
    network: MultiTaskUNet, image: Tensor, members: dict[str, list[nn.Module]]
) -> tuple[dict[nn.Module, float], dict[nn.Module, list[Shape]]]:
    """Count 10^9 multiply-adds and record output shapes of every member and the whole network."""
    gmacs: dict[nn.Module, float] = {}
    outputs: dict[nn.Module, list[Shape]] = {}
    counter = FlopCounterMode(display=False)
    wanted = [network, *(module for modules in members.values() for module in modules)]

    def before(module: nn.Module, _inputs: object) -> None:
        gmacs[module] = -counter.get_total_flops() / 2e9

    def after(module: nn.Module, _inputs: object, output: object) -> None:
        gmacs[module] += counter.get_total_flops() / 2e9
        if isinstance(output, Tensor):
            outputs[module] = [tuple(output.shape[1:])]

    hooks: list[Callable[[], None]] = []
    for module in wanted:
        gmacs[module] = 0.0  # for modules that are not called
        hooks.append(module.register_forward_pre_hook(before).remove)
        hooks.append(module.register_forward_hook(after).remove)
    with torch.no_grad(), counter:
        network(image)
    for remove in hooks:
        remove()
    return gmacs, outputs
