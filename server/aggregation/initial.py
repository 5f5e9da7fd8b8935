"""Create the initial weights of a run: random values from its seed, or pretrained weights.

Only the server creates them. It sends them to the sites, so no site needs a pretrained file.
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
    """Build a run's network with its initial weights.

    Raises:
        BackboneError: if the backbone is not supported.
        PretrainedError: if the pretrained weights cannot be loaded or do not fit the network.
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
    except Exception as error:  # noqa: BLE001 the hub's HTTP client raises its own error types
        raise PretrainedError(
            f"model.pretrained: cannot download timm's weights of {backbone} ({error}); without "
            "access to its hub, give the path of a .safetensors or .pth file with the weights"
        ) from None
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or a file written by ``torch.save``.

    Files of the second kind are pickles; only tensors and plain containers are loaded from them.
    The state dict may be inside a training checkpoint, under the key ``state_dict`` or ``model``.

    Raises:
        PretrainedError: if the file cannot be used; the message names the file and the reason.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PretrainedError(f"model.pretrained: {path.absolute()}: no such file") from None
    except pickle.UnpicklingError:
        raise PretrainedError(
            f"{path}: expected a file that contains only tensors, got another file or a pickle "
            "with other objects, which could execute code; save a state_dict() as .safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 unpickling a damaged file can raise any error
        raise PretrainedError(
            f"{path}: expected .safetensors or .pth, got {type(error).__name__}: {error}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise PretrainedError(f"{path}: expected a state dict of tensors, got another object")
    return dict(content)
