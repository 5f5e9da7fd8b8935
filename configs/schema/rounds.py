"""Settings ``run`` and ``rounds``: where results go, how many rounds, which sites."""

from __future__ import annotations

import shlex
from typing import Literal

from pydantic import Field, field_validator

from polyclinic.configs.schema.base import Section


class RunSection(Section):
    """Where a run's results go, and the seed from which all its randomness follows."""

    name: str = Field(
        "", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", description="Folder name; empty: by time."
    )
    output_dir: str = Field("runs", min_length=1, description="Folder that holds run folders.")
    seed: int = Field(0, ge=0)
    resume: str = Field(
        "", description="A run to go on with: its name in output-dir, or its folder."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="The coordinator's log; json: one object a line."
    )


class RoundsConfig(Section):
    """How long a run goes on, and how long the server waits for its sites."""

    count: int = Field(10, ge=1)
    min_sites: str = Field(
        "all",
        pattern=r"^(all|[1-9][0-9]*|[1-9][0-9]?%|100%)$",
        description="Sites that must be there in each phase: all, a number, or a percentage of the "
        "run's sites (to train, of rounds.fraction of them).",
    )
    deadline_s: float = Field(3600.0, gt=0.0, description="Longest wait for a phase's answers.")
    keep_checkpoints: int = Field(2, ge=1, description="Rounds whose checkpoints are kept.")
    wait_for_sites_s: float = Field(
        120.0, gt=0.0, description="Longest wait for sites to connect, at start and in a phase."
    )
    fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="Sites drawn to train in a round; all are evaluated."
    )
    suspend_after: int = Field(
        3, ge=0, description="Failures in a row after which a site rests; 0: never."
    )
    suspend_rounds: int = Field(2, ge=1, description="Rounds for which it rests.")
    norm_factor: float = Field(
        10.0,
        ge=0.0,
        description="An update's norm over the sites' median, above which it is refused; 0: any.",
    )
    patience: int = Field(
        0, ge=0, description="Stop after so many rounds without a better one; 0: go on."
    )
    on_event: str = Field(
        "", description="Command at the server, given each event as a JSON line on its input."
    )

    @field_validator("on_event")
    @classmethod
    def _on_event_is_a_command(cls, value: str) -> str:
        try:
            shlex.split(value)
        except ValueError as error:
            raise ValueError(
                f"rounds.on-event: expected a command, got {value!r}: {error}"
            ) from None
        return value
