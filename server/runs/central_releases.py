"""Read and write the record of a run's releases under central differential privacy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from polyclinic.configs.files import write_json


@dataclass(frozen=True)
class CentralRelease:
    """One released average, with the privacy cost of all releases up to it."""

    round: int
    sites: int  # number of sites in the accounting, whether they answered or not
    noise_multiplier: float  # with adaptive clipping: of the weights and the clipped count together
    clip_norm: float  # norm to which this round's updates were clipped
    epsilon: float  # central epsilon of this and all earlier releases of the run
    delta: float  # delta for which epsilon holds


def write_releases(path: Path, releases: Sequence[CentralRelease]) -> None:
    """Write a run's releases atomically."""
    write_json(path, {"unit": "site", "releases": [asdict(release) for release in releases]})


def read_releases(path: Path) -> tuple[CentralRelease, ...]:
    """Read a run's releases in order; empty if the file does not exist."""
    if not path.exists():
        return ()
    content = json.loads(path.read_text(encoding="utf-8"))
    return tuple(CentralRelease(**release) for release in content["releases"])
