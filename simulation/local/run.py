"""The implementation of the simulate command: check, launch and show a run."""

from __future__ import annotations

import json
from typing import Any

from polyclinic.client.training.device import DeviceError
from polyclinic.configs.output import messages, print_json, print_result, print_table
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.backbone import BackboneError
from polyclinic.mtl_model.distance import DistanceError
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.mtl_model.pretrained import PretrainedError
from polyclinic.server.rounds.errors import RunRefused
from polyclinic.server.runs.display import Display
from polyclinic.server.runs.history import POOLED
from polyclinic.server.runs.tables import class_tables, metrics_table, withheld_text
from polyclinic.simulation.local.launch import LaunchError, Plan, launch, plan

DONE, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 130


def run_simulation(config: RunConfig, parallel: int | None, as_json: bool) -> int:
    """Run a simulation and print its results to standard output, messages to standard error.

    Args:
        config: the settings of the run.
        parallel: number of sites that compute at the same time; None for the default of ``plan``.
        as_json: True to print the results as JSON, False to print tables.

    Returns:
        The exit status: 0 completed, 1 failed, 2 user error, 130 stopped by the user.
    """
    words = messages()
    words.print("reading images", highlight=False)
    try:
        planned = plan(config, parallel)
    except (BackboneError, DeviceError, DistanceError, PretrainedError, RunRefused) as error:
        words.print(f"error: {error}", soft_wrap=True)
        return USER_ERROR
    except KeyboardInterrupt:
        words.print("stopped before the run started")
        return STOPPED
    words.print(f"run folder {planned.folder.path}", soft_wrap=True)
    try:
        with Display(planned.config, words) as display:
            end = launch(planned, display.follow)
    except LaunchError as error:
        words.print(f"error: {error}", soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:
        words.print(f"stopped; saved results are in {planned.folder.path}", soft_wrap=True)
        return STOPPED
    if end["status"] != "completed":
        words.print(
            f"error: the run {end['status']}: {end['reason']}\n"
            f"logs and saved results: {planned.folder.path}",
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
        print_json(summary)
        return
    rows = {site: Metrics.from_json(values) for site, values in results["sites"].items()}
    rows[POOLED] = Metrics.from_json(results[POOLED])
    title = f"Round {results['round']} (best on validation), on the held-out test images"
    print_table(metrics_table(title, rows, results["positive"]))
    for table in class_tables(rows, planned.config.data):
        print_table(table)
    for line in withheld_text(results["withheld"]):
        print_result(line)
    print_result(f"run folder: {folder.path}")
