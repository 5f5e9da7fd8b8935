"""Check whether a site's contribution is plausible: its counts, its steps and its update norm.

Wrong names, wrong shapes and non-finite values are refused when a reply is read
(server/rounds/messages.py). This module compares the contribution with the site's description of
itself and with the other sites. The checks stop accidents (a learning rate a thousand times too
large, defective memory, a site that counts pixels instead of images) and crude attacks. Against
an attacker who stays within these limits, use a robust strategy (``strategy.name``).
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

HELD = 8  # contributions held in memory in the first round until their norms are compared
MIN_SITES = 3  # minimum number of sites for a comparison of norms: fewer show no outlier
SLACK = 2  # allowed ratio of reported to expected counts, since a site may have added images

_CHUNK = 1 << 20

Update = tuple[float, int]  # L2 norm and number of steps


def check_counts(
    contribution: Contribution, report: TrainReport, described: SiteReport, train: TrainConfig
) -> None:
    """Compare the counts of a reply with the site's description from before round 1.

    Raises:
        ReplyError: if the site trained on more than twice the images that it described, or took
            more than twice the steps that the settings give for its images.
    """
    examples = contribution.counts["encoder"]
    expected = described.examples[wire.TRAIN_SPLIT]
    if examples > SLACK * max(expected, 1):
        raise ReplyError(
            f"counts: expected about the {expected} training images that the site described, got "
            f"{examples}"
        )
    steps = train.steps(examples)
    if report.steps > SLACK * steps:
        raise ReplyError(
            f"counts: expected about {steps} steps from {examples} images, got {report.steps}"
        )


def update_norm(contribution: Contribution, sent: Packed) -> float:
    """Compute the L2 norm of a site's update over all floating-point weights together."""
    total = 0.0
    for key, before in sent.items():
        if not np.issubdtype(before.dtype, np.floating):
            continue
        after = contribution.weights[key]
        for start in range(0, before.size, _CHUNK):  # chunks: one copy of a reply is large enough
            part = slice(start, start + _CHUNK)
            total += float(np.square(np.subtract(after[part], before[part], dtype=float)).sum())
    return math.sqrt(total)


def check_norm(update: Update, others: Sequence[Update], factor: float) -> None:
    """Check that the norm of an update is not too large compared with the sites' median.

    The limit is ``factor`` times the median norm. It grows in proportion to the steps that the
    site took beyond the median, so that a hospital with many images is not refused.

    Args:
        update: norm and steps of the update.
        others: norms and steps of the reference updates; in the first round they include the
            update itself.
        factor: largest allowed multiple of the median norm; 0 disables the check.

    Raises:
        ReplyError: if the norm is larger than the limit.
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
    """Filter one round's contributions by their update norms as they arrive.

    From the second round each contribution is checked immediately against the sites' last accepted
    updates. In the first round up to ``HELD`` contributions are held and then compared with each
    other.

    Args:
        sent: the weights that were sent to the sites.
        reference: norms and steps of the sites' last accepted updates.
        factor: largest allowed multiple of the median norm (``check_norm``).
        accept: receives each accepted contribution with its report and norm.
    """

    def __init__(
        self,
        sent: Packed,
        reference: Sequence[Update],
        factor: float,
        accept: Callable[[Contribution, TrainReport, float], None],
    ) -> None:
        self.sent = sent
        self.reference = list(reference) if len(reference) >= MIN_SITES else []
        self.factor = factor
        self.accept = accept
        self.held: list[tuple[Contribution, TrainReport, float]] = []

    def take(self, contribution: Contribution, report: TrainReport) -> dict[str, str]:
        """Check a contribution, or hold it for a later comparison.

        Returns:
            The reasons of the held contributions that this call refused, keyed by site.

        Raises:
            ReplyError: if this contribution is refused.
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
        """Compare the held contributions with each other and accept or refuse them.

        Returns:
            The reasons of the refused contributions, keyed by site.
        """
        refused: dict[str, str] = {}
        updates = [(norm, report.steps) for _, report, norm in self.held]
        held, self.held = self.held, []
        for contribution, report, norm in held:
            try:
                if len(updates) >= MIN_SITES:
                    check_norm((norm, report.steps), updates, self.factor)
            except ReplyError as error:
                refused[contribution.site] = str(error)
            else:
                self.accept(contribution, report, norm)
        return refused
