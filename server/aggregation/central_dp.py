"""Apply central differential privacy: clip each site's update and add noise to the average.

The unit of privacy is a whole site: it is hard to infer from a run's averaged models whether a
site's updates were included. This gives no protection against the coordinator, which sees every
update without noise. The sites' own private training (client/privacy/dp_sgd.py) protects against
the coordinator; its unit is a patient or an image, and its noise and epsilon are separate from
the ones here.

The mechanism, with n sites in the run and u_i the update of site i:

    clip     c_i = u_i * min(1, clip-norm / norm of u_i), with one L2 norm over all weights
    noise    s = sum of c_i + Gaussian noise, standard deviation noise-multiplier * clip-norm
    average  weights + s / n

The accounting is valid because of the following properties:

- *A site changes s by at most clip-norm.* All sites have the same weight, regardless of their
  numbers of examples, and n is fixed when the run starts: a site that does not answer adds zero and
  still counts in n. The arithmetic is in float64, in which clipping is exact to 1e-13; in float32
  it would not be exact over millions of weights. The conversion to float32 follows the noise.
- *A task that only some sites train* is part of the same update, and a site without the task adds
  zeros. The division by the number of sites that declared the task, instead of n, comes after the
  noise.
- *The noise is not reproducible.* Flower draws from NumPy's global generator, and a seed set
  anywhere in the process would make its values predictable. While Flower draws the noise, the
  generator is replaced by one with a seed of 128 bits of the operating system's entropy.

Flower's wrappers implement clipping, noise and the adaptive norm. Their errors are corrected here,
each with a test that demonstrates it (tests/server/aggregation/test_central_dp.py).
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
    """Flower's adaptive clipping, corrected to match the published algorithm.

    The algorithm is that of Andrew et al., "Differentially Private Learning with Adaptive
    Clipping", 2021. Flower 1.41 differs from it in three ways:

    - It adjusts the norm in the wrong direction, away from the target quantile: down when most
      updates are clipped, up when none are.
    - It adjusts the norm before it scales the round's noise, so that the noise can be too small for
      the norm that the updates were clipped to.
    - A missing site changes the denominator of the share of clipped updates. Here a missing site
      counts as one half in a fixed number of sites, so that a site changes the count by at most one
      half, as the accounting assumes.
    """

    _share_clipped: float

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        released = super().aggregate_train(server_round, replies)
        # Flower subtracts the target from this argument, which reverses the sign of the result.
        super()._geometric_update(2 * self.target_clipped_quantile - self._share_clipped)
        return released

    def _noisy_fraction(self, count: int, total: int) -> float:
        missing = self.num_sampled_clients - total
        share = super()._noisy_fraction(count, self.num_sampled_clients)
        return share + missing / 2 / self.num_sampled_clients

    def _geometric_update(self, clipped_fraction: float) -> None:
        self._share_clipped = clipped_fraction  # applied after the round's noise is drawn


class CentralPrivacy:
    """The averages of a run under central differential privacy, with their privacy cost.

    Args:
        config: settings of central differential privacy.
        sites: number of sites that train each task group, as declared before round 1; all sites
            train the encoder.
        path: file with the record of the releases; releases in it already count as spent.
        clip_norm: current adaptive norm of a resumed run; None for the initial norm of the
            settings.
        entropy: creates the generator of the noise; set only in tests.
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
        """Return the norm to which the next round's updates are clipped."""
        return float(self.wrapper.clipping_norm)

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs in addition to the file of releases."""
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
        """Compute and record one round's private average, instead of ``average_by_task``.

        The release is recorded on disk before the average is returned. A crash in between can
        waste privacy budget, but it cannot cause a release that is not counted.

        Args:
            number: the round.
            contributions: the sites' weights after local training.
            current: the weights that were sent to the sites.

        Raises:
            ValueError: if an array is not of floating-point type, since it cannot carry noise.
        """
        refuse_integers(current)
        before = {key: array.astype(np.float64) for key, array in current.items()}
        replies: list[Message] = []
        for contribution in sorted(contributions, key=lambda c: c.site):
            trained = self._only_trained(contribution, before)
            # An unchanged site is left out, since Flower would divide by its norm of 0; it then
            # adds zero, as a missing site does.
            if any((trained.weights[key] != before[key]).any() for key in before):
                replies.append(message_of(trained))
        absent = self.sites["encoder"] - len(replies)
        if absent:
            log.warning(
                "round %d: %d of %d sites have no update; each counts as an update of zero, and "
                "the noise and the denominator remain those of %d sites",
                number,
                absent,
                self.sites["encoder"],
                self.sites["encoder"],
            )
        clip_norm = self.clip_norm  # read before the release, which changes an adaptive norm
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
        self.wrapper.current_arrays, self.average_of_all.sent = ArrayRecord(), {}  # free memory
        if released is None:
            raise RuntimeError(f"round {number}: Flower's wrapper returned no average")
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
        """Average over all sites of the run, with an update of zero for missing sites."""
        absent = self.sites["encoder"] - len(contributions)
        unchanged = Contribution("", current, dict.fromkeys(self.sites, absent))
        return average_by_task([*contributions, unchanged], current)

    def _only_trained(self, contribution: Contribution, before: Packed) -> Contribution:
        """Give a contribution unit weight, and reset the groups that its site did not train."""
        weights = {
            key: contribution.weights[key] if self._trains(contribution, key) else array
            for key, array in before.items()
        }
        return Contribution(contribution.site, weights, dict.fromkeys(self.sites, 1))

    def _trains(self, contribution: Contribution, key: str) -> bool:
        group = group_of_key(key)
        return contribution.counts[group] > 0 and self.sites[group] > 0

    def _by_declared(self, key: str, before: NDArray[Any], noisy: NDArray[Any]) -> NDArray[Any]:
        """Rescale a noisy mean over all sites to one over the sites that declared the group.

        A group that no site declared keeps its values.
        """
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
        # With few sites, a twentieth of them is so little that the noise on the weights could not
        # compensate for it.
        clipped_count_stddev=config.clipped_count_stddev
        or max(sites / 20, config.noise_multiplier),
    )


def sites_by_group(reports: Mapping[str, SiteReport]) -> dict[Group, int]:
    """Count the sites that train each task group, from their descriptions before round 1."""
    return {
        "encoder": len(reports),
        "segmentation": sum(r.with_mask[wire.TRAIN_SPLIT] > 0 for r in reports.values()),
        "classification": sum(r.with_label[wire.TRAIN_SPLIT] > 0 for r in reports.values()),
    }


def refuse_integers(weights: Packed) -> None:
    """Check that every array has a floating-point type and can carry noise.

    Raises:
        ValueError: if one does not; the message names it.
    """
    for key, array in weights.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"{key}: expected floating-point numbers, to which noise can be added, got "
                f"{array.dtype}"
            )


def noise_to_update(config: CentralConfig, sites: int, weights: Packed) -> float:
    """Return the ratio of the noise's norm to the largest norm of the sites' mean update."""
    size = sum(array.size for array in weights.values())
    return config.noise_multiplier * math.sqrt(size) / sites


@contextlib.contextmanager
def noise_from(generator: np.random.BitGenerator) -> Iterator[None]:
    """Make NumPy's global functions draw from a generator within a ``with`` block."""
    before = mtrand.get_bit_generator()
    mtrand.set_bit_generator(generator)
    try:
        yield
    finally:
        mtrand.set_bit_generator(before)
