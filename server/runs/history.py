"""Read and write history.jsonl, the record of each site in each round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from polyclinic.configs.files import append_line, read_lines
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.server.runs.central_releases import CentralRelease
from polyclinic.server.runs.reports import TrainReport

POOLED = "pooled"  # stands for all sites together; no site may have this name

NOT_DRAWN = "not drawn (rounds.fraction)"  # why a site was left out of a round's training


@dataclass(frozen=True)
class Line:
    """The record of one site in one round, or of all sites together under the name ``pooled``."""

    round: int
    site: str
    split: str
    metrics: Metrics | None = None
    train: TrainReport | None = None
    asked: tuple[str, ...] = ()  # phases; a phase that is in none of the fields below was answered
    failed: dict[str, str] = field(default_factory=dict)  # phase: the error at the site
    declined: dict[str, str] = field(default_factory=dict)  # phase: the site's rule that forbids it
    late: dict[str, str] = field(default_factory=dict)  # phase: the deadline that was missed
    refused: dict[str, str] = field(default_factory=dict)  # phase: why the reply is invalid
    left_out: dict[str, str] = field(default_factory=dict)  # phase: why the site was not asked
    bytes_down: int = 0  # bytes of arrays sent to the site in this round
    bytes_up: int = 0  # bytes of arrays received from the site in this round
    central: CentralRelease | None = None  # the round's central release; only for ``pooled``

    @property
    def lost(self) -> dict[str, str]:
        """Return the reasons of the phases in which the site gave no valid answer."""
        return self.failed | self.late | self.refused

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Line:
        """Create a line from its JSON object; unknown keys are ignored."""
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
    """Append a line to the history."""
    append_line(path, asdict(line))


def read_history(path: Path) -> list[Line]:
    """Read all complete lines, in the order in which they were written."""
    return [Line.from_json(content) for content in read_lines(path)]
