"""The record of a run's releases under central differential privacy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from polyclinic.server.runs.folder import write_json


@dataclass(frozen=True)
class CentralRelease:
    """One average that left with noise, and what it cost together with those before it."""

    round: int
    sites: int  # that noise and denominator are for, whether they answered or not
    noise_multiplier: float  # adaptive: what the noises on weights and on the count are worth
    clip_norm: float  # that this round's updates were clipped to
    epsilon: float  # central, of this and all earlier releases of the run
    delta: float


def write_releases(path: Path, releases: Sequence[CentralRelease]) -> None:
    """Write a run's releases, whole or not at all."""
    write_json(path, {"unit": "site", "releases": [asdict(release) for release in releases]})


def read_releases(path: Path) -> tuple[CentralRelease, ...]:
    """A run's releases in order; none if there is no file."""
    if not path.exists():
        return ()
    content = json.loads(path.read_text(encoding="utf-8"))
    return tuple(CentralRelease(**release) for release in content["releases"])
