"""Average the sites' weights per task, on plain arrays and without Flower.

This is federated averaging (McMahan et al., 2017) with one set of weights per task: a site's
encoder is weighted by its number of training examples, its segmentation decoder by its examples
with a mask, and its classification head by its examples with a label. A site without masks
therefore contributes to the encoder and the head, but not to the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyclinic.mtl_model.packing import Packed, group_of_key
from polyclinic.mtl_model.tasks import Group

_CHUNK = 1 << 16  # values per step, so that intermediate results stay in a core's cache


@dataclass(frozen=True)
class Contribution:
    """One site's weights after local training in one round."""

    site: str
    weights: Packed
    counts: Mapping[Group, int]  # number of examples that each task group was trained on


class Combination(Protocol):
    """An accumulator that combines one round's contributions into one model."""

    def add(self, contribution: Contribution) -> None:
        """Add a contribution."""

    def combined(self) -> Packed:
        """Return the combined weights of all added contributions."""


class RunningAverage:
    """The average per task of contributions that are added one by one and not kept.

    Each sum consists of two float64 arrays; the second holds the rounding errors of the first
    (Knuth's two-sum). The result therefore does not depend on the order in which sites answer:
    products of float32 weights and counts are exact in float64, and sums in different orders
    differ by about 2^-100 of their value. Integer arrays (the counters of batch norm) are copied
    from the site with the most examples, since their mean has no meaning. A group that no site
    trained keeps its values from ``current``.

    Args:
        current: the weights that were sent to the sites.
    """

    def __init__(self, current: Packed) -> None:
        self.current = current
        self.counts = dict.fromkeys(current, 0)
        self._sums: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._integers: dict[str, tuple[int, str, NDArray[Any]]] = {}

    def add(self, contribution: Contribution) -> None:
        for key, before in self.current.items():
            count = contribution.counts[group_of_key(key)]
            if count == 0:
                continue
            weights = contribution.weights[key]
            self.counts[key] += count
            if np.issubdtype(before.dtype, np.integer):
                found = self._integers.get(key)
                if found is None or (-count, contribution.site) < (-found[0], found[1]):
                    self._integers[key] = (count, contribution.site, weights)
                continue
            if key not in self._sums:
                self._sums[key] = (np.zeros(before.size), np.zeros(before.size))
            _add_product(*self._sums[key], weights, count)

    def combined(self) -> Packed:
        averaged: Packed = {}
        for key, before in self.current.items():
            if key in self._integers:
                averaged[key] = self._integers[key][2]
            elif key in self._sums:
                averaged[key] = _mean(*self._sums[key], self.counts[key], before.dtype)
            else:
                averaged[key] = before
        return averaged


def _add_product(
    total: NDArray[np.float64],
    rounded_away: NDArray[np.float64],
    weights: NDArray[Any],
    count: int,
) -> None:
    """Add ``count * weights`` in place to a sum that is held in two arrays."""
    for start in range(0, total.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        a = total[part]
        b = weights[part] * np.float64(count)
        both = a + b
        b_part = both - a
        rounded_away[part] += (a - (both - b_part)) + (b - b_part)
        total[part] = both


def _mean(
    total: NDArray[np.float64],
    rounded_away: NDArray[np.float64],
    count: int,
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    mean = np.empty(total.size, dtype)
    for start in range(0, total.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        mean[part] = (total[part] + rounded_away[part]) / count
    return mean


def average_by_task(contributions: Iterable[Contribution], current: Packed) -> Packed:
    """Average each task group over the sites that trained it (see ``RunningAverage``)."""
    average = RunningAverage(current)
    for contribution in contributions:
        average.add(contribution)
    return average.combined()
