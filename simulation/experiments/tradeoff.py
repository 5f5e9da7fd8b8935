"""Privacy-accuracy trade-off: the same run at several epsilons, per example and per patient.

Each combination is a separate simulation with its own run folder. Finished runs are reused, so an
interrupted comparison resumes where it stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from polyclinic.client.training.device import DeviceError
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import messages, print_json, print_table
from polyclinic.configs.presets import read_run_config
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.backbone import BackboneError
from polyclinic.mtl_model.distance import DistanceError
from polyclinic.mtl_model.pretrained import PretrainedError
from polyclinic.server.rounds.errors import RunRefused
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import POOLED, read_history
from polyclinic.simulation.local.launch import LaunchError, launch, plan

Values = dict[str, dict[str, float | None]]  # maps site, then metric, to its value

UNFIT = (BackboneError, DeviceError, DistanceError, PretrainedError, RunRefused)
UNITS = ("example", "patient")


@dataclass(frozen=True)
class Setting:
    """One row of the table: a target epsilon and a privacy unit."""

    epsilon: float  # infinity for a run without privacy
    unit: str  # "example" or "patient"; "none" for a run without privacy

    @property
    def name(self) -> str:
        """The part of the run's name that identifies the setting."""
        return "none" if math.isinf(self.epsilon) else f"{self.epsilon:g}-{self.unit}"


def run_tradeoff(
    config: RunConfig,
    epsilons: str,
    units: str,
    seeds: str,
    parallel: int | None,
    as_json: bool,
) -> int:
    """Run the simulations that are missing and print a table of all results.

    Args:
        config: the settings that all runs share.
        epsilons: target epsilons, separated by commas; ``inf`` for a run without privacy.
        units: ``example``, ``patient`` or both, separated by commas.
        seeds: seeds, separated by commas; every combination is run with each.
        parallel: number of sites that compute at the same time; None for the default of ``plan``.
        as_json: True to print JSON, False to print tables.

    Returns:
        The exit status: 0 completed, 1 if a run failed.

    Raises:
        ConfigError: if an epsilon, unit or seed is invalid, or the run has no name.
    """
    if not config.run.name:
        raise ConfigError("tradeoff: expected run.name, the prefix of its run folders, got none")
    settings = settings_of(epsilons, units)
    if not all(seed.isdigit() for seed in seeds.split(",")):
        raise ConfigError(f"--seeds: expected whole numbers separated by commas, got {seeds!r}")
    words = messages()
    found: dict[Setting, list[Values]] = {}
    spent: dict[Setting, dict[str, float]] = {}
    for seed in map(int, seeds.split(",")):
        for setting in settings:
            folder = _run(config, setting, seed, parallel, words)
            if folder is None:
                return 1
            found.setdefault(setting, []).append(_values(folder))
            spent[setting] = _spent(folder)
    if as_json:
        content = [
            {
                "epsilon": None if math.isinf(setting.epsilon) else setting.epsilon,
                "unit": setting.unit,
                "spent": spent[setting],
                "by_seed": values,
            }
            for setting, values in found.items()
        ]
        print_json({"settings": content})
        return 0
    for title, metric in (("Dice", "dice"), ("AUC", "auc")):
        print_table(table(f"{title} on the held-out test images", found, metric))
    return 0


def settings_of(epsilons: str, units: str) -> list[Setting]:
    """List all combinations of epsilons and units, with a single one for no privacy.

    Raises:
        ConfigError: if an epsilon or unit is invalid.
    """
    settings: list[Setting] = []
    for unit in units.split(","):
        if unit not in UNITS:
            raise ConfigError(f"--units: expected some of {', '.join(UNITS)}, got {unit!r}")
    for text in epsilons.split(","):
        try:
            epsilon = float(text)
        except ValueError:
            epsilon = math.nan
        if not epsilon > 0:
            raise ConfigError(f"--epsilons: expected numbers above 0 or inf, got {text!r}")
        for unit in ("none",) if math.isinf(epsilon) else units.split(","):
            settings.append(Setting(epsilon, unit))
    return settings


def _run(
    config: RunConfig, setting: Setting, seed: int, parallel: int | None, words: Console
) -> RunFolder | None:
    """Run one combination unless it is finished; return its folder, or None if it failed."""
    changes: dict[str, bool | int | float | str] = {
        "run.name": f"{config.run.name}-{setting.name}-{seed}",
        "run.seed": seed,
        "privacy.mode": "off",
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 0.0,
    }
    if not math.isinf(setting.epsilon):
        changes |= {
            "privacy.mode": "dp-sgd",
            "privacy.target-epsilon": setting.epsilon,
            "privacy.unit": setting.unit,
        }
    wanted = RunConfig.from_flat({**config.to_flat(), **changes})
    folder = next_folder(wanted)
    if folder.results.is_file():
        words.print(f"{folder.name}: already finished")
        return folder
    words.print(f"{folder.name}: running")
    named = wanted.run.model_copy(update={"name": folder.name})
    try:
        planned = plan(wanted.model_copy(update={"run": named}), parallel)
        end = launch(planned, lambda _event: None)
    except (*UNFIT, LaunchError) as error:
        words.print(f"error: {folder.name}: {error}", soft_wrap=True)
        return None
    if end["status"] != "completed":
        words.print(f"error: {folder.name} {end['status']}: {end['reason']}", soft_wrap=True)
        return None
    return planned.folder


def next_folder(wanted: RunConfig) -> RunFolder:
    """Find the folder of a finished run with these settings, or a new folder for it.

    The folder of an interrupted run is not changed; the next attempt appends its number to the
    name.

    Raises:
        ConfigError: if a run of this name was finished with other settings.
    """
    base = Path(wanted.run.output_dir).expanduser().absolute()
    for attempt in count(1):
        name = wanted.run.name if attempt == 1 else f"{wanted.run.name}-try{attempt}"
        folder = RunFolder(base / name)
        if not folder.path.exists():
            return folder
        if folder.results.is_file():
            was, now = _essential(read_run_config(folder.config)), _essential(wanted)
            differ = sorted(key for key in now if now[key] != was.get(key))
            if differ:
                raise ConfigError(
                    f"{folder.path}: expected a run with these settings, got one with a different "
                    f"{', '.join(differ)}; choose a different --name"
                )
            return folder
    raise AssertionError("count is endless")


def _essential(config: RunConfig) -> dict[str, bool | int | float | str]:
    """Return the settings that determine the results of a run, without paths and names."""
    places = ("run.name", "run.output-dir", "data.root", "data.sites", "model.pretrained")
    return {key: value for key, value in config.to_flat().items() if key not in places}


def _values(folder: RunFolder) -> Values:
    results: dict[str, Any] = json.loads(folder.results.read_text(encoding="utf-8"))
    sites: Mapping[str, Any] = {**results["sites"], POOLED: results[POOLED]}
    return {site: {key: of[key] for key in ("dice", "auc")} for site, of in sites.items()}


def _spent(folder: RunFolder) -> dict[str, float]:
    """Return the epsilon of each site after its last round."""
    return {
        line.site: line.train.epsilon
        for line in read_history(folder.history)
        if line.train and line.train.epsilon is not None
    }


def table(title: str, found: Mapping[Setting, Sequence[Values]], metric: str) -> Table:
    """Format the mean over seeds, with minimum and maximum, of one metric as a table.

    Args:
        title: title of the table.
        found: results of each seed, by setting.
        metric: key of the metric.
    """
    seeds = max(map(len, found.values()))
    laid = Table(
        title=title,
        title_justify="left",
        caption=f"mean of {seeds} seeds (minimum-maximum)",
        caption_justify="left",
    )
    laid.add_column("epsilon", justify="right")
    laid.add_column("unit")
    sites = list(next(iter(found.values()))[0])
    for site in sites:
        laid.add_column(site, justify="right")
    for setting, runs in found.items():
        cells = (_cell([values[site][metric] for values in runs]) for site in sites)
        laid.add_row(
            "no privacy" if math.isinf(setting.epsilon) else f"{setting.epsilon:g}",
            "" if math.isinf(setting.epsilon) else setting.unit,
            *cells,
        )
    return laid


def _cell(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.3f}"
    return f"{statistics.mean(known):.3f} ({min(known):.3f}-{max(known):.3f})"
