"""Run the rounds of a run: train, combine, evaluate and save, from the start or a saved round."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import Message, RecordDict

from polyclinic.configs import wire
from polyclinic.configs.files import write_json
from polyclinic.configs.run import RunConfig
from polyclinic.mtl_model.metrics import Metrics, compute
from polyclinic.mtl_model.sums import Classes, MetricSums, empty_sums
from polyclinic.server.aggregation.averaging import Contribution
from polyclinic.server.aggregation.central_dp import CentralPrivacy
from polyclinic.server.aggregation.parameters import Parts
from polyclinic.server.aggregation.strategies import combination_of, optimiser_of
from polyclinic.server.rounds.errors import RunFailed
from polyclinic.server.rounds.federation import Federation, Phase, sites_needed
from polyclinic.server.rounds.messages import (
    RunIdentity,
    check_origin,
    read_evaluation,
    read_training,
    task,
)
from polyclinic.server.rounds.roster import sample
from polyclinic.server.rounds.update_checks import UpdateFilter, check_counts
from polyclinic.server.runs.checkpoint import Best, ServerState, save_round
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import NOT_DRAWN, POOLED, Line, write_line
from polyclinic.server.runs.reports import TrainReport
from polyclinic.server.runs.tables import central_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one model on one split at every site."""

    metrics: dict[str, Metrics]  # keyed by site, with POOLED last
    phase: Phase[tuple[MetricSums, tuple[str, ...]]]
    withheld: dict[str, tuple[str, ...]]  # what each site's policy withholds from its sums


class Rounds:
    """The rounds of one run, from the initial weights to the test results of the best model.

    Args:
        config: settings of the run.
        folder: folder that the run writes to.
        federation: the sites, already connected.
        parts: the shared and the personal parts of the network.
        state: the server's state at the start of the run, or after the round to resume from.
        identity: identity that every message of the run carries.
        watch: called with every new line of the history.
        central: central differential privacy; None if it is off.
    """

    def __init__(  # noqa: PLR0913 settings of one call, each used by name
        self,
        config: RunConfig,
        folder: RunFolder,
        federation: Federation,
        parts: Parts,
        state: ServerState,
        identity: RunIdentity,
        watch: Callable[[Line], None] = lambda line: None,
        central: CentralPrivacy | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.federation = federation
        self.parts = parts
        self.identity = identity
        self.watch = watch
        self.central = central
        self.optimiser = optimiser_of(config.strategy)
        if self.optimiser is not None:
            self.optimiser.restore(state.moments)
        self.done = state.number
        self.weights, self.initial = parts.divide(state.weights)
        self.best = state.best
        self.best_weights = parts.divide(state.best_weights)[0] if state.best_weights else None
        self.stopped_early = False

    def run(self) -> Evaluation:
        """Run the remaining rounds, then test the best round's model.

        Raises:
            RunFailed: if too few sites answered a phase. The rounds saved so far are kept, and the
                run can be resumed from the last one.
        """
        while self.done < self.config.rounds.count and not self._exhausted():
            self.one_round(self.done + 1)
        return self.test()

    def _exhausted(self) -> bool:
        """Return whether rounds.patience rounds have passed without a better round."""
        patience, best = self.config.rounds.patience, self.best
        if not patience or best is None or self.done - best.number < patience:
            return False
        log.info(
            "stopped after round %d: no round since round %d was better (rounds.patience)",
            self.done,
            best.number,
        )
        self.stopped_early = True
        return True

    def one_round(self, number: int) -> None:
        """Run one round: train at its sites, combine, evaluate at every site, and save."""
        trained, reports = self.train(number)
        release = self.central.releases[-1] if self.central else None
        evaluation = self._evaluate(number, wire.VAL_SPLIT)
        self._choose(number, evaluation)
        size = sum(array.nbytes for array in self.weights.values())
        down = size + sum(array.nbytes for array in self.initial.values())
        phases: Mapping[str, Phase[Any]] = {"train": trained, "evaluate": evaluation.phase}
        outcomes = {
            outcome: {name: getattr(phase, outcome) for name, phase in phases.items()}
            for outcome, _ in trained.outcomes()
        }
        for site in (*sorted(self.federation.roster.standings), POOLED):
            asked = tuple(name for name, phase in phases.items() if site in phase.asked)
            why = {
                outcome: {name: why[site] for name, why in by_phase.items() if site in why}
                for outcome, by_phase in outcomes.items()
            }
            line = Line(
                number,
                site,
                wire.VAL_SPLIT,
                evaluation.metrics.get(site),
                reports.get(site),
                asked,
                failed=why["failed"],
                declined=why["declined"],
                late=why["late"],
                refused=why["refused"],
                left_out=why["left_out"],
                bytes_down=down * len(asked),
                bytes_up=size if site in reports else 0,
                central=release if site == POOLED else None,
            )
            self._record(line)
        for site, metrics in evaluation.metrics.items():
            log.info("round %d/%d: %s: %s", number, self.config.rounds.count, site, metrics.brief())
        if release is not None:
            log.info("round %d/%d: %s", number, self.config.rounds.count, central_text(release))
        self._save(number)  # after the history, so that a saved round is always complete
        self.federation.notify(
            {
                "event": "round",
                "round": number,
                "best": self.best.number if self.best else None,
                "metrics": {site: asdict(m) for site, m in evaluation.metrics.items()},
                "asked": {name: phase.asked for name, phase in phases.items()},
                **{
                    outcome: {s: why for sites in by_phase.values() for s, why in sites.items()}
                    for outcome, by_phase in outcomes.items()
                },
                "epsilon": {s: r.epsilon for s, r in reports.items() if r.epsilon is not None},
                "central": asdict(release) if release else None,
            }
        )

    def test(self) -> Evaluation:
        """Evaluate the best round's model on the held-out test images of every site."""
        number = self.best.number if self.best else self.done
        if self.best_weights is not None:
            self.weights = self.best_weights
        evaluation = self._evaluate(number, wire.TEST_SPLIT)
        for site, metrics in evaluation.metrics.items():
            self._record(Line(number, site, wire.TEST_SPLIT, metrics))
        write_json(
            self.folder.results,
            {
                "split": wire.TEST_SPLIT,
                "round": number,
                "positive": self.config.data.positive,
                "sites": {s: asdict(m) for s, m in evaluation.metrics.items() if s != POOLED},
                POOLED: asdict(evaluation.metrics[POOLED]),
                "failed": evaluation.phase.lost | evaluation.phase.left_out,
                "declined": evaluation.phase.declined,
                "withheld": evaluation.withheld,
            },
        )
        return evaluation

    def train(self, number: int) -> tuple[Phase[None], dict[str, TrainReport]]:
        """Train at the round's sites and update the weights from their contributions.

        Returns:
            The outcomes of the phase, and the training reports keyed by site.

        Raises:
            RunFailed: if too few sites answered, or if the aggregated weights are invalid.
        """
        federation, settings = self.federation, self.config.rounds
        eligible = federation.roster.eligible(number)
        chosen = sample(eligible, settings.fraction, self.config.run.seed, number)
        suspended = federation.roster.suspended(number)
        suspended |= {site: NOT_DRAWN for site in eligible if site not in chosen}
        reports: dict[str, TrainReport] = {}
        gathered: list[Contribution] = []
        combination = combination_of(self.config.strategy, self.weights)
        take = gathered.append if self.central else combination.add

        def accept(contribution: Contribution, report: TrainReport, norm: float) -> None:
            take(contribution)
            reports[contribution.site] = report
            federation.roster.moved(contribution.site, norm, report.steps)

        reference = federation.roster.reference_updates()
        updates = UpdateFilter(self.weights, reference, settings.norm_factor, accept)

        refused: dict[str, str] = {}

        def read(reply: Message, site: str) -> None:
            check_origin(reply, self.identity, number, site)
            contribution, report = read_training(reply, site, self.parts.shared)
            check_counts(contribution, report, federation.reports[site], self.config.train)
            refused.update(updates.take(contribution, report))

        content = self._task(number, wire.TRAIN_SPLIT)
        needed = self._needed(settings.fraction)
        phase = federation.ask(
            number, "train", wire.TRAIN, content, chosen, read, needed, suspended
        )
        for site, reason in (refused | updates.close()).items():
            phase.refuse(site, reason)
        federation.finish_phase(number, phase, needed)
        if self.central is not None:
            combined = self.central.average(number, gathered, self.weights)
        else:
            combined = combination.combined()
        if self.optimiser is not None:
            combined = self.optimiser.step(number, self.weights, combined)
        try:
            self.parts.shared.check(combined)
        except ValueError as error:
            raise RunFailed(
                f"round {number}: the aggregated weights are invalid: {error}; try a smaller "
                "strategy.server-learning-rate"
            ) from None
        self.weights = combined
        return phase, reports

    def _evaluate(self, number: int, split: str) -> Evaluation:
        federation, data = self.federation, self.config.data

        def read(reply: Message, site: str) -> tuple[MetricSums, tuple[str, ...]]:
            check_origin(reply, self.identity, number, site)
            return read_evaluation(reply, data)

        current = self.done + 1 if split == wire.VAL_SPLIT else self.done
        sites, suspended = federation.roster.eligible(current), federation.roster.suspended(current)
        content, name, needed = self._task(number, split), f"evaluate on {split}", self._needed()
        phase = federation.ask(number, name, wire.EVALUATE, content, sites, read, needed, suspended)
        federation.finish_phase(current, phase, needed)
        sums = {site: found for site, (found, _) in sorted(phase.answered.items())}
        withheld = {s: words for s, (_, words) in sorted(phase.answered.items()) if words}
        classes = Classes.of(data)
        metrics = {site: compute(s, classes) for site, s in sums.items()}
        metrics[POOLED] = compute(sum(sums.values(), empty_sums(classes)), classes)
        return Evaluation(metrics, phase, withheld)

    def _needed(self, fraction: float = 1.0) -> int:
        """Return the number of sites that must answer; suspended sites count as missing."""
        sites = math.ceil(fraction * len(self.federation.roster.standings))
        return sites_needed(self.config.rounds.min_sites, sites)

    def _task(self, number: int, split: str) -> RecordDict:
        best = self.best.number if self.best else 0
        shared = self.parts.shared
        return task(self.identity, number, shared, self.weights, split, self.initial, best)

    def _choose(self, number: int, evaluation: Evaluation) -> None:
        """Update the best round.

        Values from different numbers of sites are not comparable, so an evaluation at more sites
        always replaces one at fewer.
        """
        value = evaluation.metrics[POOLED].value(self.config.evaluate.select_by)
        if value is None:
            return
        sites = len(evaluation.metrics) - 1
        if self.best is None or (sites, value) > (self.best.sites, self.best.value):
            self.best, self.best_weights = Best(number, value, sites), self.weights

    def _save(self, number: int) -> None:
        """Save the state from which the run can be resumed.

        Raises:
            RunFailed: if the state cannot be written to the run folder.
        """
        state = ServerState(
            number,
            self.parts.unite(self.weights, self.initial),
            self.best,
            moments=self.optimiser.state() if self.optimiser else {},
            sites=self.federation.roster.state(),
            central=self.central.state() if self.central else None,
        )
        whole, run = self.parts.whole, self.identity.run
        try:
            self.best = save_round(self.folder, self.config, whole, run, state)
        except OSError as error:
            raise RunFailed(
                f"round {number} could not be saved in {self.folder.path}: {error}; free disk "
                "space and resume the run"
            ) from None
        self.done = number

    def _record(self, line: Line) -> None:
        write_line(self.folder.history, line)
        self.watch(line)
