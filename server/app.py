"""What the coordinator does when a run starts: read settings, gather sites, run rounds, tell."""

from __future__ import annotations

import logging
import platform
import time

import flwr
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from configs import VERSION
from configs.run import RunConfig
from mtl_model.backbone import BackboneError
from mtl_model.metrics import Metrics
from mtl_model.network import MultiTaskUNet
from mtl_model.packing import Layout, Packed
from mtl_model.pretrained import PretrainedError
from server.central import CentralPrivacy, noise_to_update, refuse_integers, sites_by_group
from server.folder import RunFolder, write_json
from server.history import Line
from server.initial import initial_network
from server.records import SiteReport
from server.report import class_tables, metrics_table, withheld_text
from server.rounds import (
    Evaluation,
    Federation,
    Rounds,
    RunRefused,
    gather_sites,
    progress_writer,
)

log = logging.getLogger(__name__)


def server_app() -> ServerApp:
    """Make the app that Flower starts for every run."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _log_to_stream()
        run(grid, RunConfig.from_flat(context.run_config))

    return app


def _log_to_stream() -> None:
    """Show the coordinator's own words in ``flwr run --stream``, and no library's."""
    ours = logging.getLogger("server")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False


def run(grid: Grid, config: RunConfig) -> RunFolder:
    """Run a run from its settings to its results.

    Whatever ends it, the run folder says how (outcome.json), and what ended it is raised so that
    Flower calls the run failed.
    """
    folder = RunFolder.create(config)
    notify = progress_writer(folder)
    started = time.time()
    status, reason, rounds = "failed", "", None
    try:
        network = _initial(config)
        federation, reports = gather_sites(grid, config, notify)
        write_json(folder.environment, _environment(config, reports))
        _announce(reports)
        rounds = _rounds(config, folder, federation, network, reports)
        evaluation = rounds.run()
        status = "completed"
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
            "best-round": best.number if best else None,
            "best-value": best.value if best else None,
        }
        write_json(folder.outcome, outcome)
        notify({"event": "end", **outcome})
    _print_results(config, folder, evaluation)
    return folder


def _initial(config: RunConfig) -> MultiTaskUNet:
    try:
        return initial_network(config.model, config.data, config.loss, config.run.seed)
    except (BackboneError, PretrainedError) as error:
        raise RunRefused(str(error)) from None


def _rounds(
    config: RunConfig,
    folder: RunFolder,
    federation: Federation,
    network: MultiTaskUNet,
    reports: dict[str, SiteReport],
) -> Rounds:
    from torch.utils.tensorboard import SummaryWriter  # 1 s to import, needed here alone

    layout = Layout.of(network)
    writer = SummaryWriter(str(folder.path))

    def watch(line: Line) -> None:
        for name, value in _scalars(line.metrics).items() if line.metrics else ():
            writer.add_scalar(f"{line.split}-{name}/{line.site}", value, line.round)
        for name, value in vars(line.train).items() if line.train else ():
            if value is not None:
                writer.add_scalar(f"train-{name}/{line.site}", value, line.round)
        if line.central:
            writer.add_scalar("central-epsilon/site", line.central.epsilon, line.round)
        writer.flush()

    weights = layout.pack(network.state_dict())
    central = _central(config, folder, reports, weights)
    return Rounds(config, folder, federation, layout, weights, watch, central)


def _central(
    config: RunConfig, folder: RunFolder, reports: dict[str, SiteReport], weights: Packed
) -> CentralPrivacy | None:
    if config.central.mode == "off":
        return None
    try:
        refuse_integers(weights)
    except ValueError as error:
        raise RunRefused(f"central.mode {config.central.mode}: {error}") from None
    ratio = noise_to_update(config.central, len(reports), weights)
    say = log.info if ratio < 1 else log.warning
    say(
        "central differential privacy of %d sites: each round's noise has %.3g times the largest "
        "norm that the average update can have",
        len(reports),
        ratio,
    )
    return CentralPrivacy(config.central, sites_by_group(reports), folder.central)


def _scalars(metrics: Metrics) -> dict[str, float]:
    """Every value that is defined, a class's own under the class's name ("dice-mass")."""
    found = vars(metrics)
    for by_class in (metrics.mask_classes, metrics.image_classes):
        for name, of_class in by_class.items():
            found = found | {f"{field}-{name}": value for field, value in vars(of_class).items()}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def _environment(config: RunConfig, reports: dict[str, SiteReport]) -> dict[str, object]:
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
    }


def _announce(reports: dict[str, SiteReport]) -> None:
    for name, report in reports.items():
        counts = ", ".join(f"{split} {n}" for split, n in report.examples.items())
        log.info("site %s: %s images on %s", name, counts, report.device)
        for sentence in report.skipped:
            log.warning("site %s left out: %s", name, sentence)


def _print_results(config: RunConfig, folder: RunFolder, evaluation: Evaluation) -> None:
    """The table and the folder, where ``flwr run --stream`` shows them."""
    console = Console(width=110, markup=False, highlight=False)
    title = f"Best round's model on the held-out test images ({folder.name})"
    console.print(metrics_table(title, evaluation.metrics, config.data.positive))
    for table in class_tables(evaluation.metrics, config.data):
        console.print(table)
    for line in withheld_text(evaluation.withheld):
        console.print(line, soft_wrap=True)
    console.print(f"Run folder: {folder.path}", soft_wrap=True)
