"""Settings ``run`` and ``rounds``: results, number of rounds, participation and timeouts."""

from __future__ import annotations

import shlex
from typing import Literal

from pydantic import Field, field_validator

from polyclinic.configs.schema.base import Section


class RunSection(Section):
    """Name, results folder, seed and log format of a run."""

    name: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="Name of the run and of its folder; empty: the date and time of its start.",
    )
    output_dir: str = Field(
        "runs",
        min_length=1,
        description="Folder in which each run gets its own folder, on the coordinator.",
    )
    seed: int = Field(0, ge=0, description="Seed of all random choices of the run.")
    resume: str = Field(
        "",
        description="Run to resume: its name in run.output-dir, or its folder; empty: start a new "
        "run.",
    )
    log_format: Literal["text", "json"] = Field(
        "text",
        description="Format of the coordinator's log. text: lines for people; json: one JSON "
        "object per line.",
    )


class RoundsConfig(Section):
    """Number of rounds, participation, timeouts and early stopping."""

    count: int = Field(10, ge=1, description="Number of rounds.")
    min_sites: str = Field(
        "all",
        pattern=r"^(all|[1-9][0-9]*|[1-9][0-9]?%|100%)$",
        description="Sites that must answer in each phase, or the run stops: all, a number, or a "
        "percentage of the run's sites as 50%. In training, all and percentages count the sites "
        "that rounds.fraction draws.",
    )
    deadline_s: float = Field(
        3600.0, gt=0.0, description="Longest wait for the sites' answers in one phase, in seconds."
    )
    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="Number of latest rounds with checkpoints that are kept, in addition to the "
        "best round's.",
    )
    wait_for_sites_s: float = Field(
        120.0,
        gt=0.0,
        description="Longest wait for enough sites to connect, at the start of the run and before "
        "each phase, in seconds.",
    )
    fraction: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Share of the sites that is drawn to train in each round, rounded up; 1: all "
        "sites. All sites are evaluated.",
    )
    suspend_after: int = Field(
        3,
        ge=0,
        description="Number of consecutive failed phases after which a site is suspended; 0: "
        "never.",
    )
    suspend_rounds: int = Field(
        2, ge=1, description="Number of rounds for which a failing site is suspended."
    )
    norm_factor: float = Field(
        10.0,
        ge=0.0,
        description="Refuse an update with a norm larger than this factor times the median of the "
        "sites' norms; 0: refuse none.",
    )
    patience: int = Field(
        0,
        ge=0,
        description="Stop the run after this number of rounds without a new best round; 0: run "
        "all rounds.",
    )
    on_event: str = Field(
        "",
        description="Command that the coordinator starts for each event of the run, with the event "
        "as one line of JSON on standard input; empty: none.",
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
