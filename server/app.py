"""Run the coordinator's part of a run: read settings, wait for sites, run rounds, show results."""

from __future__ import annotations

import json
import logging
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from polyclinic.configs import VERSION
from polyclinic.configs.files import write_atomically, write_json
from polyclinic.configs.output import print_result, print_table
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.rounds import RoundsConfig
from polyclinic.mtl_model.backbone import BackboneError
from polyclinic.mtl_model.metrics import Metrics
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.pretrained import PretrainedError
from polyclinic.server.aggregation.central_dp import (
    CentralPrivacy,
    noise_to_update,
    refuse_integers,
    sites_by_group,
)
from polyclinic.server.aggregation.initial import initial_network
from polyclinic.server.aggregation.parameters import Parts
from polyclinic.server.rounds.errors import RunRefused
from polyclinic.server.rounds.federation import Federation
from polyclinic.server.rounds.grid import GridClient
from polyclinic.server.rounds.loop import Evaluation, Rounds
from polyclinic.server.rounds.messages import RunIdentity, question
from polyclinic.server.runs.checkpoint import ResumeError, ServerState, load_latest
from polyclinic.server.runs.events import Events
from polyclinic.server.runs.folder import RunFolder, to_toml
from polyclinic.server.runs.history import Line
from polyclinic.server.runs.logs import log_to_stream
from polyclinic.server.runs.reports import SiteReport
from polyclinic.server.runs.resume import resumed_config
from polyclinic.server.runs.tables import class_tables, metrics_table, withheld_text

log = logging.getLogger(__name__)


def server_app() -> ServerApp:
    """Create the app that Flower starts for every run."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run(grid, RunConfig.from_flat(context.run_config))

    return app


def run(grid: GridClient, config: RunConfig) -> RunFolder:
    """Execute a run from its settings to its results, or resume one (``run.resume``).

    The outcome is always written to outcome.json in the run folder. An error is also raised, so
    that Flower marks the run as failed.

    Args:
        grid: Flower's connection to the sites.
        config: settings of the run.

    Returns:
        The folder of the run.

    Raises:
        ConfigError: if the folder belongs to another run, or the run cannot be resumed with these
            settings.
        RunRefused: if the run cannot start; outcome.json has the same reason.
        RunFailed: if the run cannot continue; outcome.json has the same reason.
    """
    log_to_stream(config.run.log_format)
    if config.run.resume:
        config = resumed_config(config)
        folder = RunFolder(Path(config.run.resume))
    else:
        folder = RunFolder.create(config)
    with folder.locked(), Events(folder, config.rounds.on_event) as events:
        return _run(grid, config, folder, events)


def _run(grid: GridClient, config: RunConfig, folder: RunFolder, events: Events) -> RunFolder:
    started = time.time()
    status, reason, rounds = "failed", "", None
    try:
        network = _initial(config)
        parts = Parts.of(network, config.strategy)
        state = _state(config, folder, network, parts)
        if config.run.resume:
            events.notify({"event": "resumed", "round": state.number})
        identity = _identity(config, folder)
        federation = Federation(
            grid, config.rounds, config.data, lambda: question(identity), events.notify
        )
        federation.roster.restore(state.sites)
        federation.wait_for_sites(config)
        federation.closed = config.central.mode != "off"
        _check_sampling(config.rounds, len(federation.reports))
        reports = dict(sorted(federation.reports.items()))
        write_json(folder.environment, _environment(config, folder, reports))
        _announce(reports)
        central = _central(config, folder, reports, parts, state)
        watch = _tensorboard(folder, state.number)
        rounds = Rounds(config, folder, federation, parts, state, identity, watch, central)
        evaluation = rounds.run()
        status = "completed"
        reason = "stopped early: no better round (rounds.patience)" if rounds.stopped_early else ""
    except BaseException as error:
        status = "refused" if isinstance(error, RunRefused) else "failed"
        reason = str(error) or type(error).__name__
        raise
    finally:
        best = rounds.best if rounds else None
        outcome = {
            "status": status,
            "reason": reason,
            "seconds": round(time.time() - started, 1),
            "rounds": rounds.done if rounds else 0,
            "best_round": best.number if best else None,
            "best_value": best.value if best else None,
        }
        try:
            write_json(folder.outcome, outcome)
            events.notify({"event": "end", **outcome})
        except OSError as error:  # for example a full disk; must not hide why the run ended
            log.error("outcome %s: %s; cannot write outcome.json: %s", status, reason, error)
    _print_results(config, folder, evaluation)
    return folder


def _state(
    config: RunConfig, folder: RunFolder, network: MultiTaskUNet, parts: Parts
) -> ServerState:
    """Return the initial state of the run, or the state after the last saved round."""
    initial = ServerState(0, parts.whole.pack(network.state_dict()))
    if not config.run.resume:
        return initial
    try:
        state = load_latest(folder, parts.whole, folder.identity) or initial
    except ResumeError as error:
        raise RunRefused(str(error)) from None
    folder.rewind(state.number)
    fresh = RunConfig.from_flat({**config.to_flat(), "run.resume": ""})
    write_atomically(folder.config, to_toml(fresh).encode())
    log.info("resuming after round %d of %d", state.number, config.rounds.count)
    return state


def _identity(config: RunConfig, folder: RunFolder) -> RunIdentity:
    if not config.run.resume:
        return RunIdentity(folder.identity)
    flat = {**config.to_flat(), "run.resume": ""}
    return RunIdentity(folder.identity, json.dumps(flat))


def _check_sampling(rounds: RoundsConfig, sites: int) -> None:
    """Check that the sites drawn for a round can reach the required number of sites."""
    drawn = math.ceil(rounds.fraction * sites)
    if rounds.min_sites.isdigit() and int(rounds.min_sites) > drawn:
        raise RunRefused(
            f"rounds.min-sites: expected at most {drawn}, the number that rounds.fraction "
            f"{rounds.fraction:g} draws from {sites} sites, got {rounds.min_sites}"
        )


def _initial(config: RunConfig) -> MultiTaskUNet:
    try:
        return initial_network(config.model, config.data, config.loss, config.run.seed)
    except (BackboneError, PretrainedError) as error:
        raise RunRefused(str(error)) from None


def _tensorboard(folder: RunFolder, done: int) -> Callable[[Line], None]:
    """Return a function that writes a line of the history as TensorBoard scalars."""
    from torch.utils.tensorboard import SummaryWriter  # takes 1 s to import; used only here

    writer = SummaryWriter(str(folder.path), purge_step=done + 1 if done else None)

    def watch(line: Line) -> None:
        for name, value in _scalars(line.metrics).items() if line.metrics else ():
            writer.add_scalar(f"{line.split}-{name}/{line.site}", value, line.round)
        for name, value in vars(line.train).items() if line.train else ():
            if value is not None:
                writer.add_scalar(f"train-{name}/{line.site}", value, line.round)
        if line.central:
            writer.add_scalar("central-epsilon/site", line.central.epsilon, line.round)
        writer.flush()

    return watch


def _central(
    config: RunConfig,
    folder: RunFolder,
    reports: dict[str, SiteReport],
    parts: Parts,
    state: ServerState,
) -> CentralPrivacy | None:
    if config.central.mode == "off":
        return None
    weights = parts.divide(state.weights)[0]
    try:
        refuse_integers(weights)
    except ValueError as error:
        raise RunRefused(f"central.mode {config.central.mode}: {error}") from None
    ratio = noise_to_update(config.central, len(reports), weights)
    report = log.info if ratio < 1 else log.warning
    report(
        "central differential privacy with %d sites: the norm of each round's noise is about %.3g "
        "times the largest possible norm of the average update",
        len(reports),
        ratio,
    )
    clip_norm = float(state.central["clip-norm"]) if state.central else None
    return CentralPrivacy(config.central, sites_by_group(reports), folder.central, clip_norm)


def _scalars(metrics: Metrics) -> dict[str, float]:
    """Return the defined values; values of one class are suffixed with its name ("dice-mass")."""
    found = vars(metrics)
    for by_class in (metrics.mask_classes, metrics.image_classes):
        for name, values in by_class.items():
            found = found | {f"{field}-{name}": value for field, value in vars(values).items()}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def _environment(
    config: RunConfig, folder: RunFolder, reports: dict[str, SiteReport]
) -> dict[str, object]:
    """Describe versions, machine, seed and sites; a resumed run keeps the earlier descriptions."""
    before: list[dict[str, Any]] = []
    if config.run.resume and folder.environment.is_file():
        last = json.loads(folder.environment.read_text(encoding="utf-8"))
        before = [*last.pop("before", []), last]
        for name, report in reports.items():
            fingerprint = last["sites"].get(name, {}).get("fingerprint", report.fingerprint)
            if fingerprint != report.fingerprint:
                log.warning("site %s: its data have changed since the run started", name)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "polyclinic": VERSION,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "flwr": flwr.__version__,
        },
        "machine": platform.platform(),
        "seed": config.run.seed,
        "sites": {name: vars(report) for name, report in reports.items()},
        **({"before": before} if before else {}),
    }


def _announce(reports: dict[str, SiteReport]) -> None:
    for name, report in reports.items():
        counts = ", ".join(f"{split} {n}" for split, n in report.examples.items())
        log.info("site %s: %s images on %s", name, counts, report.device)
        for sentence in report.skipped:
            log.warning("site %s: left out: %s", name, sentence)


def _print_results(config: RunConfig, folder: RunFolder, evaluation: Evaluation) -> None:
    """Print the test results and the run folder, which ``flwr run --stream`` shows."""
    title = f"Best round's model on the held-out test images ({folder.name})"
    print_table(metrics_table(title, evaluation.metrics, config.data.positive))
    for table in class_tables(evaluation.metrics, config.data):
        print_table(table)
    for line in withheld_text(evaluation.withheld):
        print_result(line)
    print_result(f"Run folder: {folder.path}")
