"""The simulate command's work: check, launch, show, sum up."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

from polyclinic.client.training.device import DeviceError
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.backbone import BackboneError
from polyclinic.mtl_model.distance import DistanceError
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.mtl_model.pretrained import PretrainedError
from polyclinic.server.rounds.federation import RunRefused
from polyclinic.server.runs.display import Display
from polyclinic.server.runs.history import POOLED
from polyclinic.server.runs.tables import class_tables, metrics_table, withheld_text
from polyclinic.simulation.local.launch import LaunchError, Plan, launch, plan

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 130


def run_simulation(config: RunConfig, parallel: int | None, as_json: bool) -> int:
    """Run a simulation from settings to results on standard output; words go to standard error.

    Returns:
        The exit status: 0 done, 1 failed, 2 the user's mistake, 130 stopped.
    """
    words = Console(stderr=True, markup=False)
    words.print("reading images", highlight=False)
    try:
        planned = plan(config, parallel)
    except (BackboneError, DeviceError, DistanceError, PretrainedError, RunRefused) as error:
        words.print(f"error: {error}", soft_wrap=True)
        return MISTAKE
    except KeyboardInterrupt:
        words.print("stopped before anything was started")
        return STOPPED
    words.print(f"run folder {planned.folder.path}", soft_wrap=True)
    try:
        with Display(planned.config, words) as display:
            end = launch(planned, display.follow)
    except LaunchError as error:
        words.print(f"error: {error}", soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        words.print(f"stopped; what was saved is in {planned.folder.path}", soft_wrap=True)
        return STOPPED
    if end["status"] != "completed":
        words.print(
            f"error: the run {end['status']}: {end['reason']}\n"
            f"logs and what was saved: {planned.folder.path}",
            soft_wrap=True,
            markup=False,
        )
        return FAILED
    _print_results(planned, end, as_json)
    return DONE


def _print_results(planned: Plan, end: dict[str, Any], as_json: bool) -> None:
    folder = planned.folder
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    if as_json:
        summary = {"run": str(folder.path), "seconds": end["seconds"], **results}
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return
    rows = {site: Metrics.from_json(values) for site, values in results["sites"].items()}
    rows[POOLED] = Metrics.from_json(results[POOLED])
    out = Console(width=None if sys.stdout.isatty() else 110, markup=False, highlight=False)
    title = f"Round {results['round']}, the best on validation, on the held-out test images"
    out.print(metrics_table(title, rows, results["positive"]))
    for table in class_tables(rows, planned.config.data):
        out.print(table)
    for line in withheld_text(results["withheld"]):
        out.print(line, soft_wrap=True)
    out.print(f"run folder: {folder.path}", soft_wrap=True, highlight=False)
