"""The folder that a run leaves behind: where each thing lies, written so that a crash spoils none.

config.toml          the run's settings, every key
run.json             the run's identity, which its messages and checkpoints carry
environment.json     versions, seed, release, sites and their data's fingerprints
history.jsonl        one line a round and site (server/runs/history.py)
progress.jsonl       one line an event, for whoever watches
checkpoints/         the last few rounds, and the best one (server/runs/checkpoint.py)
best.safetensors     the weights of the best round
results.json         the best round's model on the held-out test images
central.json         what central differential privacy has cost, where it is on
outcome.json         how the run ended; absent while it goes on, and after a crash
events.*             TensorBoard
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @classmethod
    def free(cls, config: RunConfig) -> RunFolder:
        """Say where a new run's folder will be, without making it.

        Raises:
            ConfigError: if a run of that name is there already.
        """
        out = Path(config.run.output_dir).expanduser().absolute()
        if not config.run.name:
            now = time.strftime("%Y%m%d-%H%M%S")
            names = (now if i == 1 else f"{now}-{i}" for i in itertools.count(1))
            return cls(next(out / name for name in names if not (out / name).exists()))
        folder = cls(out / config.run.name)
        if folder.config.exists() or folder.outcome.exists():
            raise ConfigError(
                f"run.name: {folder.path} holds a run already; give another name, or none to have "
                "one made"
            )
        return folder

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """Make a new run's folder and write its config.

        A launcher may have made the folder before, to keep its own logs in it.

        Raises:
            ConfigError: if a run of that name is there already.
        """
        folder = cls.free(config)
        if not config.run.name:
            folder.path.mkdir(parents=True)  # raises if another run took it this instant
        (folder.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(folder.identity_file, {"run": uuid.uuid4().hex})
        write_atomically(folder.config, to_toml(config).encode())
        return folder

    @classmethod
    def of(cls, name: str, output_dir: str) -> RunFolder:
        """Find the folder of a run that is there, by its name or its path.

        Raises:
            ConfigError: if there is none.
        """
        out = Path(output_dir).expanduser().absolute()
        path = out / name if (out / name).is_dir() else Path(name).expanduser().absolute()
        folder = cls(path)
        if not folder.config.is_file():
            raise ConfigError(f"run.resume: {name}: no such run under {out}")
        if not folder.identity_file.is_file():
            raise ConfigError(
                f"run.resume: {path}: is of an earlier version, which had no "
                f"{folder.identity_file.name}, and cannot be resumed"
            )
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to this run; it ends with the process at the latest.

        Raises:
            ConfigError: if one does already.
        """
        with self.identity_file.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{self.path}: another process runs this run") from None
            yield

    @property
    def identity(self) -> str:
        """What the run's messages and checkpoints carry, also after it was resumed."""
        return str(json.loads(self.identity_file.read_text(encoding="utf-8"))["run"])

    def read_outcome(self) -> dict[str, Any]:
        """How the run ended; empty while it goes on, and after a crash."""
        if not self.outcome.is_file():
            return {}
        return dict(json.loads(self.outcome.read_text(encoding="utf-8")))

    def rewind(self, number: int) -> None:
        """Take back what was written after a round, before the run goes on from there."""
        lines = [line for line in read_lines(self.history) if line["split"] == "val"]
        kept = [json.dumps(line) + "\n" for line in lines if line["round"] <= number]
        write_atomically(self.history, "".join(kept).encode())
        events = [json.dumps(line) + "\n" for line in read_lines(self.progress)]
        write_atomically(self.progress, "".join(events).encode())  # without a line cut short
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
        """Rounds that have a checkpoint, in order."""
        return self._rounds("state-{}.json")

    def saved_weights(self) -> list[int]:
        """Rounds whose weights are there, the best one's beside the last few."""
        return self._rounds("round-{}.safetensors")

    def _rounds(self, name: str) -> list[int]:
        pattern = re.escape(name).replace(r"\{\}", r"(\d+)")
        found = (re.fullmatch(pattern, p.name) for p in (self.path / "checkpoints").glob("*"))
        return sorted(int(match[1]) for match in found if match)


def to_toml(config: RunConfig) -> str:
    """A run's settings as TOML that ``flwr run -c`` and ``polyclinic simulate --config`` take."""
    lines: list[str] = []
    section = ""
    for key, value in config.to_flat().items():
        table, _, name = key.partition(".")
        if table != section:
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
            section = table
        # JSON's strings, numbers and booleans are TOML's
        lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, also if the machine stops in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Add one JSON line; a reader ignores one that a crash cut short (``read_lines``)."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; none if there is no file."""
    return read_lines_from(path, 0)[0]


def read_lines_from(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """The complete lines from a byte position on, and the position behind them."""
    if not path.exists():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        complete, newline, _ = file.read().rpartition(b"\n")
    return [json.loads(line) for line in complete.splitlines()], position + len(complete + newline)
