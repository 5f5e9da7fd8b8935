"""Save and load the server's state after each round, from which a run can be resumed.

checkpoints/round-0007.safetensors    weights of the network after round 7
checkpoints/moments-0007.safetensors  moments of the server optimiser, if there is one
checkpoints/state-0007.json           the rest of the state, and the sha256 of all three files

The state file is written last, so a round is saved if and only if its state file exists. Each
file is written under a temporary name and renamed. The last rounds (rounds.keep-checkpoints) are
kept, and the best round's weights as long as a kept state refers to them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from polyclinic.configs import VERSION
from polyclinic.configs.files import write_atomically, write_json
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.server.runs.folder import RunFolder

log = logging.getLogger(__name__)


class ResumeError(ValueError):
    """The run cannot be resumed. The message says what is wrong with each checkpoint."""


@dataclass(frozen=True)
class Best:
    """The best round so far according to ``evaluate.select-by``."""

    number: int  # the round
    value: float  # value of the metric
    sites: int  # number of sites that evaluated the round
    sha256: str = ""  # digest of the round's checkpoint; empty until it is saved


@dataclass
class ServerState:
    """The complete state of the server after a round, which the next round starts from."""

    number: int  # the last completed round; 0 before round 1
    weights: Packed  # weights of the whole network; personal layers have their initial values
    best: Best | None = None  # None if no round has a defined metric yet
    best_weights: Packed | None = None
    moments: Packed = field(default_factory=dict)  # moments of the server optimiser; may be empty
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # state of the roster
    central: Mapping[str, Any] | None = None  # state of central differential privacy; None if off


def save_round(
    folder: RunFolder, config: RunConfig, layout: Layout, identity: str, state: ServerState
) -> Best | None:
    """Save the state after a round, then delete the rounds that are no longer kept.

    Args:
        folder: the run's folder.
        config: settings of the run.
        layout: layout of the whole network.
        identity: identifier of the run, which is stored in its checkpoints.
        state: the state to save.

    Returns:
        The best round, with the sha256 of its checkpoint.

    Raises:
        OSError: if the state cannot be written; earlier rounds are kept.
    """
    number, best = state.number, state.best
    content = _serialised(config, layout, state.weights, number)
    write_atomically(folder.checkpoint(number), content)
    if best is not None and best.number == number:
        best = replace(best, sha256=_sha256(content))
    about: dict[str, Any] = {
        "round": number,
        "run": identity,
        "layout": layout.digest,
        "sha256": _sha256(content),
        "best": asdict(best) if best else None,
        "sites": dict(state.sites),
    }
    if state.moments:
        moments = safetensors.numpy.save(state.moments)
        write_atomically(folder.moments(number), moments)
        about["moments-sha256"] = _sha256(moments)
    if state.central is not None:
        about["central"] = dict(state.central)
    write_json(folder.state(number), about | {"state-sha256": _state_digest(about)})
    if best is not None and best.number == number:
        write_atomically(folder.best, content)  # after the state file: the round is saved
    _tidy(folder, config.rounds.keep_checkpoints)
    return best


def load_latest(folder: RunFolder, layout: Layout, identity: str) -> ServerState | None:
    """Load the latest valid state of this run, or return None if no round was saved.

    A state that is damaged or belongs to another run is logged, and the one before it is tried.

    Raises:
        ResumeError: if there are saved states and none of them can be used.
    """
    problems: list[str] = []
    for number in reversed(folder.checkpoints()):
        try:
            state = _load_round(folder, layout, identity, number)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            problems.append(f"{folder.state(number).name}: {error}")
            log.warning("checkpoint of round %d cannot be used: %s", number, error)
            continue
        if state.best and state.best_weights is not None:
            # A crash or a damaged later round may have left another round's weights in the file.
            content = folder.checkpoint(state.best.number).read_bytes()
            write_atomically(folder.best, content)
        return state
    if problems:
        raise ResumeError(
            f"{folder.path}: none of the checkpoints can be used: {'; '.join(problems)}"
        )
    return None


def _load_round(folder: RunFolder, layout: Layout, identity: str, number: int) -> ServerState:
    about = json.loads(folder.state(number).read_text(encoding="utf-8"))
    if about.pop("state-sha256", None) != _state_digest(about):
        raise ValueError("expected a state that matches its sha256, got one that was changed")
    for key, expected in (("run", identity), ("layout", layout.digest), ("round", number)):
        if about[key] != expected:
            raise ValueError(
                f"expected {key} {expected}, got {about[key]}: it belongs to another run"
            )
    weights = _weights(folder.checkpoint(number), about["sha256"], layout)
    moments: Packed = {}
    if "moments-sha256" in about:
        content = _checked(folder.moments(number), about["moments-sha256"])
        moments = safetensors.numpy.load(content)
    best = Best(**about["best"]) if about["best"] else None
    best_weights = None
    if best is not None:
        best_weights = _weights(folder.checkpoint(best.number), best.sha256, layout)
    return ServerState(
        number, weights, best, best_weights, moments, about["sites"], about.get("central")
    )


def _weights(path: Path, digest: str, layout: Layout) -> Packed:
    content = _checked(path, digest)
    return layout.pack(load(content))


def _checked(path: Path, digest: str) -> bytes:
    content = path.read_bytes()
    if _sha256(content) != digest:
        raise ValueError(f"{path.name}: expected sha256 {digest[:12]}, got {_sha256(content)[:12]}")
    return content


def _tidy(folder: RunFolder, keep: int) -> None:
    kept = folder.checkpoints()[-keep:]
    best = {
        (json.loads(folder.state(n).read_text(encoding="utf-8"))["best"] or {}).get("number")
        for n in kept
    }
    for old in folder.checkpoints()[:-keep]:
        folder.state(old).unlink()
        folder.moments(old).unlink(missing_ok=True)
    for old in folder.saved_weights():
        if old not in best and old not in kept:
            folder.checkpoint(old).unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _state_digest(about: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(about, sort_keys=True).encode())


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
    """Load a saved model's weights into a network of the same architecture.

    Raises:
        ValueError: if the file is not a safetensors file or belongs to another network; the
            message names the file.
    """
    try:
        state: dict[str, Tensor] = load(path.read_bytes())
        network.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: expected weights of this run's network: {error}") from None
