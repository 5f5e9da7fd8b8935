"""A model on disk: safetensors with what it takes to build the network again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from configs import VERSION
from configs.run import RunConfig
from mtl_model.network import MultiTaskUNet
from mtl_model.packing import Layout, Packed
from server.folder import RunFolder, write_atomically, write_json


@dataclass(frozen=True)
class Best:
    """The best round so far by ``evaluate.select-by``."""

    number: int
    value: float
    sites: int  # that evaluated it


def save_round(
    folder: RunFolder,
    config: RunConfig,
    layout: Layout,
    weights: Packed,
    number: int,
    best: Best | None,
    central: Mapping[str, Any] | None = None,
) -> None:
    """Write a round's weights and the server's state, then drop rounds that are no longer kept.

    The state is written last: a round counts as saved once its state is there.

    Args:
        central: what central differential privacy has to remember, where it is on.
    """
    content = _serialised(config, layout, weights, number)
    write_atomically(folder.checkpoint(number), content)
    if best is not None and best.number == number:
        write_atomically(folder.best, content)
    state: dict[str, Any] = {
        "round": number,
        "layout": layout.digest,
        "sha256": hashlib.sha256(content).hexdigest(),
        "best": vars(best) if best else None,
    }
    if central is not None:
        state["central"] = dict(central)
    write_json(folder.state(number), state)
    for old in folder.checkpoints()[: -config.rounds.keep_checkpoints]:
        folder.state(old).unlink()
        folder.checkpoint(old).unlink(missing_ok=True)


def _serialised(config: RunConfig, layout: Layout, weights: Packed, number: int) -> bytes:
    metadata = {
        "config": json.dumps(config.to_flat()),
        "layout": layout.digest,
        "round": str(number),
        "classes": ",".join(config.data.classes),
        "polyclinic-version": VERSION,
    }
    return save(layout.unpack(weights), metadata)


def load_weights(path: Path, network: MultiTaskUNet) -> None:
    """Put a saved model's weights into a network of the same shape.

    Raises:
        ValueError: naming the file, if it is no safetensors file or of another network.
    """
    try:
        state: dict[str, Tensor] = load(path.read_bytes())
        network.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: expected weights of this run's network, {error}") from None
