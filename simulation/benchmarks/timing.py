"""How a benchmark takes its figures: contestants in turns, memory in processes of their own.

Machines are shared, and only ratios of the same minutes mean something.
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
    """Seconds of each turn, the first of which, a warm-up, is left out."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(turns + 1), phase, console=words, transient=True):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def memory_of(module: str, arguments: Sequence[str], words: Console) -> float | None:
    """MB that a module, run as a program, prints as its peak; None, with words why, if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # of memory, as a rule: the other figures are worth having without it
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        words.print(f"no peak memory of {', '.join(arguments[:2])}: {why}", soft_wrap=True)
        return None
    return float(done.stdout)


def print_peak_memory(device: str) -> None:
    """Print MB at this process's peak; on a GPU, MB allocated there."""
    if device.startswith("cuda"):
        print(torch.cuda.max_memory_allocated(device) / 1e6)
    else:
        print(peak_of_process())


def peak_of_process() -> float:
    """MB. Not getrusage's, which a child inherits from the process that started it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status: expected a line VmHWM, found none; this needs Linux")
