"""Whether a site's contribution is what a site could have trained: counts, steps, and how far it
went.

Wrong names, shapes and values that are not finite are refused where a reply is read
(server/rounds/messages.py). What is left is judged against what the site said of itself, and
against the other sites. That keeps out accidents (a learning rate a thousand times too large,
broken memory, a site that counts pixels instead of images) and clumsy harm; whoever stays within
these bounds on purpose is what robust strategies are for (``strategy.name``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from polyclinic.configs import wire
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.packing import Packed
from polyclinic.server.aggregation.averaging import Contribution
from polyclinic.server.rounds.messages import ReplyError
from polyclinic.server.runs.reports import SiteReport, TrainReport

HELD = 8  # contributions in memory until their norms can be compared, in a run's first round
FEWEST = 3  # of fewer sites it cannot be told which one is far from the others
SLACK = 2  # a site's images may have become more since it described itself

_CHUNK = 1 << 20

Update = tuple[float, int]  # norm, steps


def check_counts(
    contribution: Contribution, report: TrainReport, described: SiteReport, train: TrainConfig
) -> None:
    """Hold a reply's counts against what the site said of itself before round 1.

    Raises:
        ReplyError: if it trained on far more images than it has, or took far more steps than the
            settings give for them.
    """
    examples = contribution.counts["encoder"]
    has = described.examples[wire.TRAIN_SPLIT]
    if examples > SLACK * max(has, 1):
        raise ReplyError(
            f"counts: expected about the {has} training images that the site described, got "
            f"{examples}"
        )
    steps = train.steps(examples)
    if report.steps > SLACK * steps:
        raise ReplyError(
            f"counts: expected about {steps} steps from {examples} images, got {report.steps}"
        )


def update_norm(contribution: Contribution, sent: Packed) -> float:
    """L2 norm of what a site changed in all floating-point weights together."""
    total = 0.0
    for key, before in sent.items():
        if not np.issubdtype(before.dtype, np.floating):
            continue
        after = contribution.weights[key]
        for start in range(0, before.size, _CHUNK):  # or differences would double a reply's memory
            part = slice(start, start + _CHUNK)
            total += float(np.square(np.subtract(after[part], before[part], dtype=float)).sum())
    return math.sqrt(total)


def check_norm(update: Update, others: Sequence[Update], factor: float) -> None:
    """Hold an update's norm against the usual one, more of it for more steps.

    A norm grows with the steps at most in proportion, so that a large hospital is not refused for
    having much to learn from.

    Args:
        others: norms and steps of all sites' updates, this one's too where it is not yet known.
        factor: how many times the median it may have; 0 for any.

    Raises:
        ReplyError: if it is larger.
    """
    norm, steps = update
    if not factor or not others:
        return
    reference, reference_steps = median(n for n, _ in others), median(s for _, s in others)
    limit = factor * reference * max(1.0, steps / reference_steps)
    if norm > limit > 0:
        raise ReplyError(
            f"update: expected a norm of at most {limit:.3g} ({factor:g} times the sites' median, "
            f"rounds.norm-factor), got {norm:.3g}"
        )


class UpdateFilter:
    """Takes one round's contributions in, as they come, and passes the good ones on.

    From the second round on each is judged at once, by the sites' last good updates. In the first,
    up to ``HELD`` are held until they can be judged by each other.

    Args:
        usual: norms and steps of the sites' last good updates.
        factor: as ``check_norm``.
        accept: what a good contribution is passed to, with its norm.
    """

    def __init__(
        self,
        sent: Packed,
        reference: Sequence[Update],
        factor: float,
        accept: Callable[[Contribution, TrainReport, float], None],
    ) -> None:
        self.sent = sent
        self.reference = list(reference) if len(reference) >= FEWEST else []
        self.factor = factor
        self.accept = accept
        self.held: list[tuple[Contribution, TrainReport, float]] = []

    def take(self, contribution: Contribution, report: TrainReport) -> dict[str, str]:
        """Judge a contribution, or hold it.

        Returns:
            By site, why one that was held is refused, if they were judged now.

        Raises:
            ReplyError: if this one is refused now.
        """
        norm = update_norm(contribution, self.sent)
        if self.reference:
            check_norm((norm, report.steps), self.reference, self.factor)
            self.accept(contribution, report, norm)
            return {}
        self.held.append((contribution, report, norm))
        if len(self.held) < HELD:
            return {}
        self.reference = [(norm, report.steps) for _, report, norm in self.held]
        return self.close()

    def close(self) -> dict[str, str]:
        """Judge what is held, by each other.

        Returns:
            By site, why it is refused.
        """
        refused: dict[str, str] = {}
        updates = [(norm, report.steps) for _, report, norm in self.held]
        held, self.held = self.held, []
        for contribution, report, norm in held:
            try:
                if len(updates) >= FEWEST:
                    check_norm((norm, report.steps), updates, self.factor)
            except ReplyError as error:
                refused[contribution.site] = str(error)
            else:
                self.accept(contribution, report, norm)
        return refused
