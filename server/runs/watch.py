"""Follow a run by reading its folder, independent of the process that executes it."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console

from polyclinic.configs.files import read_lines_from
from polyclinic.configs.presets import read_run_config
from polyclinic.configs.schema.rounds import RoundsConfig
from polyclinic.server.runs.display import Display
from polyclinic.server.runs.folder import RunFolder

POLL_S = 0.3
SPARE_S = 300.0  # seconds for averaging and writing, added to the longest wait for sites

COMPLETED, FAILED, STOPPED = 0, 1, 130


def watch_run(folder: RunFolder, silence_s: float | None = None) -> int:
    """Show a run's past events, then new ones as they arrive, until the run ends.

    Args:
        folder: the run's folder.
        silence_s: seconds without an event after which the run is considered interrupted; None
            for a limit that exceeds the longest phase.

    Returns:
        The exit status: 0 if the run completed, 1 if it failed, was refused or was interrupted,
        and 130 if the user stopped watching.
    """
    config = read_run_config(folder.config)
    silence_s = silence_s or longest_silence(config.rounds)
    words = Console(file=sys.stdout, markup=False, highlight=False)
    position, last, heard = 0, {}, time.monotonic()
    try:
        with Display(config, words, f"watching {folder.path}") as display:
            while True:
                events, position = read_lines_from(folder.progress, position)
                for event in events:
                    display.follow(event)
                    last, heard = event, time.monotonic()
                if last.get("event") == "end" and folder.outcome.exists():
                    break
                if time.monotonic() - heard > silence_s:
                    last = {}
                    break
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        words.print("stopped watching; the run continues")
        return STOPPED
    words.print(_ending(folder, last, silence_s), soft_wrap=True)
    return COMPLETED if last.get("status") == "completed" else FAILED


def longest_silence(rounds: RoundsConfig) -> float:
    """Return the longest time in seconds that a working run can be without an event."""
    return rounds.deadline_s + rounds.wait_for_sites_s + SPARE_S


def _ending(folder: RunFolder, end: dict[str, Any], silence_s: float) -> str:
    if not end:
        return (
            f"no event from {folder.name} for {silence_s:g} s: it was interrupted and can be "
            "resumed (run.resume)"
        )
    reason = f": {end['reason']}" if end["reason"] else ""
    best = f", best round {end['best_round']}" if end["best_round"] else ""
    return f"{folder.name} {end['status']} after {end['seconds']:.0f} s{best}{reason}"
