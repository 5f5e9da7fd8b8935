"""Measurement of benchmarks: alternating turns for time, separate processes for memory.

The load of a shared machine varies, so only ratios measured at the same time are meaningful.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track


def interleaved(
    steps: Mapping[str, Callable[[], object]], turns: int, phase: str, words: Console
) -> dict[str, list[float]]:
    """Time steps in alternating turns.

    Args:
        steps: functions to time, by name.
        turns: number of timed turns, after one warm-up turn.
        phase: description of the progress bar.
        words: console for progress.

    Returns:
        The duration of each turn in seconds, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(turns + 1), phase, console=words, transient=True):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def memory_of(module: str, arguments: Sequence[str], words: Console) -> float | None:
    """Run a module as a program that prints its peak memory.

    Args:
        module: name of the module.
        arguments: arguments of the program.
        words: console for the reason of a failure.

    Returns:
        The printed peak memory in MB, or None if the program failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # usually out of memory; the other measurements are still useful
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        words.print(
            f"peak memory of {', '.join(arguments[:2])} was not measured: {why}", soft_wrap=True
        )
        return None
    return float(done.stdout)


def print_peak_memory(device: str) -> None:
    """Print the peak memory of this process in MB; on a GPU, the peak memory allocated there."""
    if device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated(device) / 1e6)
    else:
        print(peak_of_process())


def peak_of_process() -> float:
    """Return the peak memory of this process in MB.

    ``getrusage`` is not used because a child inherits its value from the parent process.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status: expected a line VmHWM, which only Linux provides")
