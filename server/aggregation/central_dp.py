"""Central differential privacy: each site's update is clipped, and the average leaves with noise.

This is the consortium's, and its unit is a whole site. Whoever sees the averaged models of a run
can hardly tell whether a site's updates were in them. The coordinator, who sees every update as it
came, is not kept from anything: that is for the sites' own privacy (client/privacy/dp_sgd.py),
whose unit is a patient or an image, whose noise is another and whose epsilon is never this one.

The mechanism, with n sites that take part in the run and u_i the update of site i:

    clip    c_i = u_i * min(1, clip-norm / norm of u_i), the norm over all weights together
    noise   s = sum of c_i + a normal of deviation noise-multiplier * clip-norm for each weight
    average weights + s / n

What has to hold for this to be worth what is accounted, and how it does:

- *A site adds at most clip-norm to s.* Sites count alike, whatever their numbers of examples, and n
  is fixed when the run begins: a site that does not answer adds nothing and is not taken from n.
  Arithmetic is in float64, since what is sent out goes into it as such; in it clipping is exact to
  1e-13, in float32 over millions of weights it is not. The network's float32 comes after the noise.
- *A task that only some sites train* is part of the same update; a site without it adds zeros. That
  it is divided by the number of sites that declared the task, instead of n, comes after the noise.
- *Noise nobody can repeat.* Flower draws from NumPy's global generator, which any seed set anywhere
  in the process would make known; while it works, that one is lent 128 bits of the operating
  system's entropy.

Flower's wrappers do clipping, noise and the adaptive norm. What they get wrong is mended here, each
with a test that shows it (tests/server/aggregation/test_central_dp.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from numpy.random import mtrand
from numpy.typing import NDArray

from polyclinic.configs import wire
from polyclinic.configs.schema.central import CentralConfig
from polyclinic.mtl_model.packing import Packed, group_of_key
from polyclinic.mtl_model.tasks import Group
from polyclinic.server.aggregation.averaging import Contribution, average_by_task
from polyclinic.server.aggregation.central_accounting import central_epsilon
from polyclinic.server.aggregation.strategies import AverageByTask, message_of, packed_of, record_of
from polyclinic.server.runs.central_releases import CentralRelease, read_releases, write_releases
from polyclinic.server.runs.reports import SiteReport

log = logging.getLogger(__name__)


class AdaptiveClipping(DifferentialPrivacyServerSideAdaptiveClipping):
    """Flower's adaptive clipping as Andrew et al. ("Differentially Private Learning with Adaptive
    Clipping", 2021) have it.

    Three things in Flower 1.41 are otherwise. It moves the norm the wrong way, so that it runs away
    from the quantile: down where most are clipped, up where none is. It moves the norm before it
    scales the round's noise by it, so that the noise can be smaller than what the updates were
    clipped to asks for. And a site that is missing changes the denominator of the share of clipped
    ones; here it counts a half in a fixed number of sites, so that a site moves the count by a half
    at most, as the accounting has it.
    """

    _share_clipped: float

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        released = super().aggregate_train(server_round, replies)
        # by what Flower subtracts, the distance to the target with its sign turned
        super()._geometric_update(2 * self.target_clipped_quantile - self._share_clipped)
        return released

    def _noisy_fraction(self, count: int, total: int) -> float:
        missing = self.num_sampled_clients - total
        share = super()._noisy_fraction(count, self.num_sampled_clients)
        return share + missing / 2 / self.num_sampled_clients

    def _geometric_update(self, clipped_fraction: float) -> None:
        self._share_clipped = clipped_fraction  # until the round's noise is drawn


class CentralPrivacy:
    """The averages of a run under central differential privacy, and what they have cost.

    Args:
        sites: how many sites train each group, as they declared it before round 1; all of them
            train the encoder.
        path: the file that remembers the releases; those that it holds count as spent.
        clip_norm: where the adaptive norm goes on; None: where the settings start it.
        entropy: where noise comes from. Only tests give one.
    """

    def __init__(
        self,
        config: CentralConfig,
        sites: Mapping[Group, int],
        path: Path,
        clip_norm: float | None = None,
        entropy: Callable[[], np.random.BitGenerator] = np.random.Philox,
    ) -> None:
        self.config = config
        self.sites = sites
        self.path = path
        self.entropy = entropy
        self.releases = read_releases(path)
        self.average_of_all = AverageByTask(self._average_of_all)
        self.wrapper = _wrapper(
            config, self.average_of_all, sites["encoder"], clip_norm or config.clip_norm
        )

    @property
    def clip_norm(self) -> float:
        """What the next round's updates are clipped to."""
        return float(self.wrapper.clipping_norm)

    def state(self) -> dict[str, Any]:
        """What a run that goes on later needs beside the file of releases."""
        last = self.releases[-1] if self.releases else None
        return {
            "unit": "site",
            "clip-norm": self.clip_norm,
            "releases": len(self.releases),
            "epsilon": last.epsilon if last else 0.0,
            "delta": self.config.delta,
        }

    def average(
        self, number: int, contributions: Sequence[Contribution], current: Packed
    ) -> Packed:
        """CentralRelease one round's average, in the place of ``average_by_task``.

        The release is on disk as spent before the average is handed out: a crash in between costs
        privacy that was not needed, never privacy that is not counted.

        Raises:
            ValueError: if an array is not of floating-point numbers, which noise would ruin.
        """
        refuse_integers(current)
        before = {key: array.astype(np.float64) for key, array in current.items()}
        replies: list[Message] = []
        for contribution in sorted(contributions, key=lambda c: c.site):
            trained = self._only_trained(contribution, before)
            # Flower divides by the norm; who changed nothing adds as little as who is missing
            if any((trained.weights[key] != before[key]).any() for key in before):
                replies.append(message_of(trained))
        absent = self.sites["encoder"] - len(replies)
        if absent:
            log.warning(
                "round %d: %d of %d sites have no update; each counts as one of nothing, and noise "
                "and denominator stay those of %d",
                number,
                absent,
                self.sites["encoder"],
                self.sites["encoder"],
            )
        clip_norm = self.clip_norm  # the adaptive one is another afterwards
        noisy = self._release(number, replies, before)
        self._remember(number, clip_norm)
        return {
            key: self._by_declared(key, before[key], noisy[key]).astype(array.dtype)
            for key, array in current.items()
        }

    def _release(self, number: int, replies: list[Message], before: Packed) -> Packed:
        self.wrapper.current_arrays = record_of(before)
        self.average_of_all.sent = before
        with noise_from(self.entropy()):
            released, _ = self.wrapper.aggregate_train(number, replies)
        self.wrapper.current_arrays, self.average_of_all.sent = ArrayRecord(), {}  # large
        if released is None:
            raise RuntimeError(f"round {number}: Flower's wrapper gave no average")
        return packed_of(released)

    def _remember(self, number: int, clip_norm: float) -> None:
        multipliers = [*(r.noise_multiplier for r in self.releases), self.config.noise_multiplier]
        release = CentralRelease(
            round=number,
            sites=self.sites["encoder"],
            noise_multiplier=self.config.noise_multiplier,
            clip_norm=clip_norm,
            epsilon=central_epsilon(multipliers, self.config.delta),
            delta=self.config.delta,
        )
        self.releases = (*self.releases, release)
        write_releases(self.path, self.releases)

    def _average_of_all(self, contributions: Sequence[Contribution], current: Packed) -> Packed:
        """The mean over the run's sites, those that are missing standing still."""
        absent = self.sites["encoder"] - len(contributions)
        still = Contribution("", current, dict.fromkeys(self.sites, absent))
        return average_by_task([*contributions, still], current)

    def _only_trained(self, contribution: Contribution, before: Packed) -> Contribution:
        """A contribution that counts as any other and stands still where it has trained nothing."""
        weights = {
            key: contribution.weights[key] if self._trains(contribution, key) else array
            for key, array in before.items()
        }
        return Contribution(contribution.site, weights, dict.fromkeys(self.sites, 1))

    def _trains(self, contribution: Contribution, key: str) -> bool:
        group = group_of_key(key)
        return contribution.counts[group] > 0 and self.sites[group] > 0

    def _by_declared(self, key: str, before: NDArray[Any], noisy: NDArray[Any]) -> NDArray[Any]:
        """The mean over the sites that train the group; a group of nobody stays as it was."""
        declared = self.sites[group_of_key(key)]
        if declared == 0:
            return before
        return before + (noisy - before) * (self.sites["encoder"] / declared)


def _wrapper(
    config: CentralConfig, strategy: AverageByTask, sites: int, clip_norm: float
) -> DifferentialPrivacyServerSideFixedClipping | AdaptiveClipping:
    if config.mode == "fixed":
        return DifferentialPrivacyServerSideFixedClipping(
            strategy, config.noise_multiplier, clip_norm, sites
        )
    return AdaptiveClipping(
        strategy,
        noise_multiplier=config.noise_multiplier,
        num_sampled_clients=sites,
        initial_clipping_norm=clip_norm,
        target_clipped_quantile=config.target_clipped_quantile,
        clip_norm_lr=config.clip_norm_lr,
        # of few sites a twentieth is so little that no noise on the weights could make up for it
        clipped_count_stddev=config.clipped_count_stddev
        or max(sites / 20, config.noise_multiplier),
    )


def sites_by_group(reports: Mapping[str, SiteReport]) -> dict[Group, int]:
    """How many sites train each group, by what they say of themselves before round 1."""
    return {
        "encoder": len(reports),
        "segmentation": sum(r.with_mask[wire.TRAIN_SPLIT] > 0 for r in reports.values()),
        "classification": sum(r.with_label[wire.TRAIN_SPLIT] > 0 for r in reports.values()),
    }


def refuse_integers(weights: Packed) -> None:
    """See that every array can carry noise.

    Raises:
        ValueError: naming one that cannot.
    """
    for key, array in weights.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{key}: expected floating-point numbers, which alone carry noise")


def noise_to_update(config: CentralConfig, sites: int, weights: Packed) -> float:
    """The norm that a round's noise has, over the largest that the sites' mean update can have."""
    size = sum(array.size for array in weights.values())
    return config.noise_multiplier * math.sqrt(size) / sites


@contextlib.contextmanager
def noise_from(generator: np.random.BitGenerator) -> Iterator[None]:
    """Have NumPy's global functions draw from a generator, and from their own again afterwards."""
    before = mtrand.get_bit_generator()
    mtrand.set_bit_generator(generator)
    try:
        yield
    finally:
        mtrand.set_bit_generator(before)
