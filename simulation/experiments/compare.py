"""Compare federated training with local and pooled training on the same images, without Flower.

The comparison uses the network, images, splits and number of steps of the run. A site's local model
takes as many optimiser steps as the site took in the run; the pooled model is trained on the images
of all sites and takes the mean number of steps. As in the run, each model is selected by its best
round on the validation images of its training sites (the last round if there is no value to select
by), and tested on every site.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
from rich.progress import track
from rich.table import Table

from polyclinic.client.data.dataset import Examples, SiteData, load_site
from polyclinic.client.training.device import find_device
from polyclinic.client.training.evaluate import evaluate
from polyclinic.client.training.local_round import Round, train_one_round
from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.files import write_json
from polyclinic.configs.output import messages, print_json, print_table
from polyclinic.configs.presets import read_run_config
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.metrics import Metrics, compute
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.sums import Classes, MetricSums, empty_sums
from polyclinic.server.aggregation.initial import initial_network
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import POOLED, Line, read_history
from polyclinic.simulation.local.sites import simulated_sites

log = logging.getLogger(__name__)

LOCAL = "local"  # suffix of a model that one site trained by itself
FEDERATED = "federated"
_SHOWN = {"Dice": "dice", "balanced accuracy": "balanced_accuracy", "AUC": "auc"}

# Maps each model to its metrics on each site and on POOLED.
Comparison = dict[str, dict[str, Metrics]]


def compare_run(run: Path, as_json: bool) -> int:
    """Compare a finished simulation with local and pooled training, then print and save the result.

    Args:
        run: the run folder. The comparison is saved there as compare.json.
        as_json: True to print JSON, False to print tables.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: if the folder contains no finished run, the run was private, or its data have
            changed since.
    """
    folder = RunFolder(run.absolute())
    if not folder.results.is_file():
        raise ConfigError(
            f"{folder.path}: expected a completed run, found no {folder.results.name}"
        )
    config = read_run_config(folder.config)
    if config.privacy.mode != "off":
        raise ConfigError(
            f"{folder.path}: expected a run without privacy, because the sites of a private run do "
            "not reveal which images they trained on"
        )
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    sites = _same_data(folder, config)
    trained = rounds_trained(read_history(folder.history))
    comparison: Comparison = {}
    for name, site in sites.items():
        if not trained.get(name):
            log.warning(
                "%s, local training: no values, because the site trained in no round of the run",
                name,
            )
            nothing = compute(empty_sums(Classes.of(config.data)), Classes.of(config.data))
            comparison[f"{name} {LOCAL}"] = dict.fromkeys([*sites, POOLED], nothing)
            continue
        steps = config.train.steps(len(site.splits[wire.TRAIN_SPLIT]))
        comparison[f"{name} {LOCAL}"] = _trained_and_tested(
            config, name, site.splits, sites, steps, trained[name]
        )
    comparison[f"all {POOLED}"] = _trained_and_tested(
        *(config, f"all {POOLED}", pool(list(sites.values())), sites),
        _mean_steps(config, sites),
        sorted({number for numbers in trained.values() for number in numbers}),
    )
    federated = {**results["sites"], POOLED: results[POOLED]}
    comparison[FEDERATED] = {site: Metrics.from_json(values) for site, values in federated.items()}
    content = {
        "models": [
            {
                "model": model,  # "site-1 local", "all pooled", "federated"
                "sites": {site: asdict(metrics) for site, metrics in tested.items()},
            }
            for model, tested in comparison.items()
        ]
    }
    write_json(folder.path / "compare.json", content)
    if as_json:
        print_json(content)
    else:
        for title, field in _SHOWN.items():
            print_table(_table(f"{title} on the held-out test images", comparison, field))
    return 0


def _same_data(folder: RunFolder, config: RunConfig) -> dict[str, SiteData]:
    environment = json.loads(folder.environment.read_text(encoding="utf-8"))
    _, manifests = simulated_sites(config.data, config.phantom)
    sites = {name: load_site(manifest, config.data) for name, manifest in manifests.items()}
    for name, site in sites.items():
        before = environment["sites"].get(name, {}).get("fingerprint")
        if before != site.fingerprint:
            raise ConfigError(
                f"site {name}: the data have changed since the run (expected fingerprint "
                f"{str(before)[:12]}, got {site.fingerprint[:12]})"
            )
    return sites


def rounds_trained(history: Sequence[Line]) -> dict[str, list[int]]:
    """List the rounds in which each site trained.

    Rounds are missing if the site was absent, was not drawn, or the run stopped early.
    """
    found: dict[str, list[int]] = {}
    for line in history:
        found.setdefault(line.site, [])
        if line.train is not None:
            found[line.site].append(line.round)
    return found


def _mean_steps(config: RunConfig, sites: dict[str, SiteData]) -> int:
    each = [config.train.steps(len(s.splits[wire.TRAIN_SPLIT])) for s in sites.values()]
    return round(sum(each) / len(each))


def pool(sites: Sequence[SiteData]) -> dict[str, Examples]:
    """Concatenate the examples of all sites, separately for each split."""
    return {
        split: Examples(
            *(
                np.concatenate([getattr(site.splits[split], part.name) for site in sites])
                for part in fields(Examples)
            )
        )
        for split in wire.SPLITS
    }


def _trained_and_tested(
    config: RunConfig,
    name: str,
    splits: dict[str, Examples],
    sites: dict[str, SiteData],
    steps: int,
    numbers: Sequence[int],
) -> dict[str, Metrics]:
    train = config.train.model_copy(update={"local_steps": steps})
    device = find_device(train.device)
    network = initial_network(config.model, config.data, config.loss, config.run.seed)
    classes = Classes.of(config.data)
    best, best_state = float("-inf"), None
    for number in track(numbers, name, console=messages(), transient=True):
        train_one_round(
            network,
            splits[wire.TRAIN_SPLIT],
            Round(number, config.rounds.count, config.run.seed, name),
            data=config.data,
            train=train,
            loss=config.loss,
            device=device,
        )
        on_val = compute(_sums(config, network, splits[wire.VAL_SPLIT]), classes)
        value = on_val.value(config.evaluate.select_by)
        if value is not None and value > best:
            best, best_state = value, copy.deepcopy(network.state_dict())
    if best_state is not None:  # without any value, keep the last round, as the server does
        network.load_state_dict(best_state)
    tested = {
        site: _sums(config, network, data.splits[wire.TEST_SPLIT]) for site, data in sites.items()
    }
    total = sum(tested.values(), empty_sums(classes))
    return {site: compute(s, classes) for site, s in {**tested, POOLED: total}.items()}


def _sums(config: RunConfig, network: MultiTaskUNet, examples: Examples) -> MetricSums:
    return evaluate(
        network,
        examples,
        data=config.data,
        batch_size=config.evaluate.batch_size,
        precision=config.train.precision,
        device=find_device(config.train.device),
        hd95=config.evaluate.hd95,
    )


def _table(title: str, comparison: Comparison, field: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("trained on \\ tested on")
    columns = list(comparison[FEDERATED])
    for column in columns:
        table.add_column(column, justify="right")
    for model, tested in comparison.items():
        values = [getattr(tested[column], field) for column in columns]
        table.add_row(model, *("-" if v is None else f"{v:.3f}" for v in values))
    return table
