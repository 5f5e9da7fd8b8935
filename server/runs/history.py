"""What happened, round by round and site by site: history.jsonl, read and written here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from polyclinic.mtl_model.metrics import Metrics
from polyclinic.server.runs.central_releases import CentralRelease
from polyclinic.server.runs.folder import append_line, read_lines
from polyclinic.server.runs.reports import TrainReport

POOLED = "pooled"  # stands for all sites together; no site may be called so

NOT_DRAWN = "not drawn (rounds.fraction)"  # reason of a site that sits out a round


@dataclass(frozen=True)
class Line:
    """One site in one round; or, under the name ``pooled``, all sites together."""

    round: int
    site: str
    split: str
    metrics: Metrics | None = None
    train: TrainReport | None = None
    asked: tuple[str, ...] = ()  # phases; those that are in none below were answered
    failed: dict[str, str] = field(default_factory=dict)  # phase: why the site could not
    declined: dict[str, str] = field(default_factory=dict)  # phase: why it would not
    late: dict[str, str] = field(default_factory=dict)  # phase: how long it was waited for
    refused: dict[str, str] = field(default_factory=dict)  # phase: what was wrong with its reply
    left_out: dict[str, str] = field(default_factory=dict)  # phase: why it was not asked
    bytes_down: int = 0  # array bytes sent to the site in this round
    bytes_up: int = 0
    central: CentralRelease | None = None  # the round's noisy average; stands at ``pooled`` alone

    @property
    def lost(self) -> dict[str, str]:
        """Phases in which the site was asked in vain, and why."""
        return self.failed | self.late | self.refused

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Line:
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        if known.get("metrics"):
            known["metrics"] = Metrics.from_json(known["metrics"])
        if known.get("train"):
            known["train"] = TrainReport(**known["train"])
        if known.get("central"):
            known["central"] = CentralRelease(**known["central"])
        known["asked"] = tuple(known.get("asked", ()))
        return cls(**known)


def write_line(path: Path, line: Line) -> None:
    append_line(path, asdict(line))


def read_history(path: Path) -> list[Line]:
    """Every complete line, in the order in which they were written."""
    return [Line.from_json(content) for content in read_lines(path)]
