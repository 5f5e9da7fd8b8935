"""Define the layout of a run's folder, and write its files so that a crash leaves them intact.

config.toml          all settings of the run
run.json             identifier of the run, which its messages and checkpoints carry
environment.json     versions, machine, seed, sites and the fingerprints of their data
history.jsonl        one line per round and site (server/runs/history.py)
progress.jsonl       one line per event, which progress displays read
checkpoints/         state of the last rounds and the best round (server/runs/checkpoint.py)
best.safetensors     weights of the best round
results.json         metrics of the best round's model on the held-out test images
central.json         privacy cost of central differential privacy, if it is on
outcome.json         how the run ended; absent while it is running, and after a crash
events.*             TensorBoard event files
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.files import read_lines, write_atomically, write_json
from polyclinic.configs.run import RunConfig

STOPPED_REASON = "stopped by the user"  # reason in outcome.json of a run that the user interrupted


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def free(cls, config: RunConfig) -> RunFolder:
        """Determine the folder of a new run, without creating it.

        Raises:
            ConfigError: if a run with this name already exists.
        """
        out = Path(config.run.output_dir).expanduser().absolute()
        if not config.run.name:
            now = time.strftime("%Y%m%d-%H%M%S")
            names = (now if i == 1 else f"{now}-{i}" for i in itertools.count(1))
            return cls(next(out / name for name in names if not (out / name).exists()))
        folder = cls(out / config.run.name)
        if folder.config.exists() or folder.outcome.exists():
            raise ConfigError(
                f"run.name: {folder.path} already contains a run; use another name, or leave it "
                "empty for a generated one"
            )
        return folder

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """Create a new run's folder and write its settings.

        The folder may exist already, since a launcher may keep its own logs in it.

        Raises:
            ConfigError: if a run with this name already exists.
        """
        folder = cls.free(config)
        if not config.run.name:
            folder.path.mkdir(parents=True)  # fails if another run has just created it
        (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder.identity_file, {"run": uuid.uuid4().hex})
        write_atomically(folder.config, to_toml(config).encode())
        return folder

    @classmethod
    def of(cls, name: str, output_dir: str) -> RunFolder:
        """Find the folder of an existing run by its name or path.

        Raises:
            ConfigError: if there is no such run, or if it cannot be resumed.
        """
        out = Path(output_dir).expanduser().absolute()
        path = out / name if (out / name).is_dir() else Path(name).expanduser().absolute()
        folder = cls(path)
        if not folder.config.is_file():
            raise ConfigError(f"run.resume: {name}: no such run under {out}")
        if not folder.identity_file.is_file():
            raise ConfigError(
                f"run.resume: {path} was written by an earlier version, without a "
                f"{folder.identity_file.name}, and cannot be resumed"
            )
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run's folder within a ``with`` block, so that no other process executes the run.

        The lock is also released when the process ends.

        Raises:
            ConfigError: if another process holds the lock.
        """
        with self.identity_file.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{self.path}: another process is executing this run") from None
            yield

    @property
    def identity(self) -> str:
        """Return the run's identifier, which does not change when the run is resumed."""
        return str(json.loads(self.identity_file.read_text(encoding="utf-8"))["run"])

    def read_outcome(self) -> dict[str, Any]:
        """Read how the run ended; empty while it is running, and after a crash."""
        if not self.outcome.is_file():
            return {}
        return dict(json.loads(self.outcome.read_text(encoding="utf-8")))

    def rewind(self, number: int) -> None:
        """Remove what was written after a round, before the run is resumed from that round."""
        lines = [line for line in read_lines(self.history) if line["split"] == "val"]
        kept = [json.dumps(line) + "\n" for line in lines if line["round"] <= number]
        write_atomically(self.history, "".join(kept).encode())
        events = [json.dumps(line) + "\n" for line in read_lines(self.progress)]
        write_atomically(self.progress, "".join(events).encode())  # drops an incomplete last line
        for path in (self.outcome, self.results):
            path.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def identity_file(self) -> Path:
        return self.path / "run.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def progress(self) -> Path:
        return self.path / "progress.jsonl"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def central(self) -> Path:
        return self.path / "central.json"

    @property
    def outcome(self) -> Path:
        return self.path / "outcome.json"

    def checkpoint(self, number: int) -> Path:
        return self.path / "checkpoints" / f"round-{number:04d}.safetensors"

    def state(self, number: int) -> Path:
        return self.path / "checkpoints" / f"state-{number:04d}.json"

    def moments(self, number: int) -> Path:
        return self.path / "checkpoints" / f"moments-{number:04d}.safetensors"

    def checkpoints(self) -> list[int]:
        """Return the rounds with a saved state, in order."""
        return self._rounds("state-{}.json")

    def saved_weights(self) -> list[int]:
        """Return the rounds with saved weights, in order: the last ones and the best one."""
        return self._rounds("round-{}.safetensors")

    def _rounds(self, name: str) -> list[int]:
        pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
        found = (re.fullmatch(pattern, p.name) for p in (self.path / "checkpoints").glob("*"))
        return sorted(int(match[1]) for match in found if match)


def to_toml(config: RunConfig) -> str:
    """Format a run's settings as TOML for ``flwr run -c`` and ``polyclinic simulate --config``."""
    lines: list[str] = []
    section = ""
    for key, value in config.to_flat().items():
        table, _, name = key.partition(".")
        if table != section:
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
            section = table
        # Strings, numbers and booleans have the same syntax in JSON and TOML.
        lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"
