"""Summarise a run from the files in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.configs.presets import read_run_config
from polyclinic.server.runs.folder import STOPPED_REASON


@dataclass(frozen=True)
class RunSummary:
    """The summary of a run that `polyclinic runs` shows."""

    run: str  # folder name
    started: str | None  # local time, ISO; None before the first round
    status: str  # completed, failed, refused, stopped, or "running or interrupted"
    rounds: int  # rounds that were saved
    best_round: int | None  # None if there is no best round yet
    best_value: float | None  # value of select_by on the pooled validation images
    select_by: str  # metric that selects the best round
    strategy: str
    seed: int
    data: str  # name of the data folder, or "phantoms"
    reason: str  # why the run did not complete; empty if it did


def summary_of(folder: Path) -> RunSummary:
    """Summarise a run, also one that is running or was written by an earlier version.

    Raises:
        ConfigError: if the folder's settings cannot be read.
    """
    outcome = _read(folder / "outcome.json")
    states = sorted((folder / "checkpoints").glob("state-*.json"))
    config = read_run_config(folder / "config.toml")
    reason = str(outcome.get("reason", ""))
    status = str(outcome.get("status", "running or interrupted"))
    return RunSummary(
        run=folder.name,
        started=_read(folder / "environment.json").get("started"),
        status="stopped" if reason == STOPPED_REASON else status,
        rounds=_read(states[-1])["round"] if states else 0,
        best_round=outcome.get("best_round"),
        best_value=outcome.get("best_value"),
        select_by=config.evaluate.select_by,
        strategy=config.strategy.name,
        seed=config.run.seed,
        data=Path(config.data.root).name or "phantoms",
        reason=reason,
    )


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; keys of earlier versions have hyphens."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key.replace("-", "_"): value for key, value in content.items()}
