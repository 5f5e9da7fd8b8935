"""Following a run from its folder, wherever it runs."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console

from polyclinic.configs.presets import read_run_config
from polyclinic.configs.schema.rounds import RoundsConfig
from polyclinic.server.runs.display import Display
from polyclinic.server.runs.folder import RunFolder, read_lines_from

POLL_S = 0.3
SPARE_S = 300.0  # for averaging and writing, beside the longest wait for sites

COMPLETED, FAILED, STOPPED = 0, 1, 130


def watch_run(folder: RunFolder, silence_s: float | None = None) -> int:
    """Show a run's events as they come, those of before first, until it ends.

    Args:
        silence_s: without a word for so long, the run is taken to be interrupted; None for longer
            than any of its phases can last.

    Returns:
        The exit status: 0 completed, 1 failed, refused or no longer heard of, 130 left.
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
        words.print("stopped watching; the run goes on")
        return STOPPED
    words.print(_ending(folder, last, silence_s), soft_wrap=True)
    return COMPLETED if last.get("status") == "completed" else FAILED


def longest_silence(rounds: RoundsConfig) -> float:
    """Seconds that a run which is well says nothing for, at most."""
    return rounds.deadline_s + rounds.wait_for_sites_s + SPARE_S


def _ending(folder: RunFolder, end: dict[str, Any], silence_s: float) -> str:
    if not end:
        return (
            f"nothing was heard of {folder.name} for {silence_s:g} s: it was interrupted, and can "
            "be resumed (run.resume)"
        )
    reason = f": {end['reason']}" if end["reason"] else ""
    best = f", best round {end['best-round']}" if end["best-round"] else ""
    return f"{folder.name} {end['status']} after {end['seconds']:.0f} s{best}{reason}"
