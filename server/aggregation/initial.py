"""The weights that a run starts from: drawn from its seed, or partly learned elsewhere before.

They are made at the server alone and sent to the sites, so no site needs a pretrained file.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.network import MultiTaskUNet, network_of
from polyclinic.mtl_model.pretrained import PretrainedError, load_pretrained


def initial_network(
    model: ModelConfig, data: DataConfig, loss: LossConfig, seed: int
) -> MultiTaskUNet:
    """Build a run's network with the weights of its first round.

    Raises:
        BackboneError: if the backbone cannot serve.
        PretrainedError: if the pretrained weights cannot be had or do not fit.
    """
    network = network_of(model, data, loss, seed)
    if model.pretrained == "timm":
        load_pretrained(network, model, data.channels, _from_timm(model.backbone))
    elif model.pretrained != "none":
        path = Path(model.pretrained).expanduser()
        weights = read_weights(path)
        try:
            load_pretrained(network, model, data.channels, weights)
        except PretrainedError as error:
            raise PretrainedError(f"{path}: {error}") from None
    return network


def _from_timm(backbone: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = timm.create_model(backbone, pretrained=True).state_dict()
    except Exception as error:  # noqa: BLE001 the hub's HTTP client has errors of its own kinds
        raise PretrainedError(
            f"model.pretrained: timm's weights of {backbone} cannot be had ({error}); without "
            "access to its hub, give a file (.safetensors or .pth) of them"
        ) from None
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file, or from what torch.save wrote.

    The latter is a pickle, of which nothing but tensors and plain containers is let in. A state
    dict inside a training checkpoint (``state_dict``, ``model``) is found.

    Raises:
        PretrainedError: naming the file and why it cannot be used.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PretrainedError(f"{path.absolute()}: no such file (model.pretrained)") from None
    except pickle.UnpicklingError:
        raise PretrainedError(
            f"{path}: expected a file of tensors, got something else, or a pickle of more than "
            "that, which could run code of its own; save a state_dict() as .safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 of a file that was hurt, any that a pickle can raise
        raise PretrainedError(
            f"{path}: expected .safetensors or .pth, got {type(error).__name__}: {error}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise PretrainedError(f"{path}: expected a state dict of tensors, got something else")
    return dict(content)
