"""The arithmetic that makes one model of the sites' models: plain arrays, no Flower.

Federated averaging (McMahan et al., 2017), task by task: the shared encoder is weighted by each
site's training examples, the segmentation part by its examples with a mask, the classification
head by its examples with a label. A site without masks thus shapes encoder and head, and its
untrained decoder counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyclinic.mtl_model.packing import Packed, group_of_key
from polyclinic.mtl_model.tasks import Group

_CHUNK = 1 << 16  # values at once, so that what is in between stays in a core's cache


@dataclass(frozen=True)
class Contribution:
    """One site's weights after a local round."""

    site: str
    weights: Packed
    counts: Mapping[Group, int]  # training examples that shaped each group's weights


class Combination(Protocol):
    """One round's contributions on their way to one model."""

    def add(self, contribution: Contribution) -> None:
        """Take a contribution in."""

    def combined(self) -> Packed:
        """The model of all that were added."""


class RunningAverage:
    """The average by task, of contributions that are added as they come and then forgotten.

    A sum is two float64 arrays, the second of which holds what the first has rounded away (Knuth's
    two-sum), so that the result does not depend on who answered first: products of float32 weights
    and counts are exact, and what two such sums in different orders differ by is some 2^-100 of
    them. Integer arrays (batch norm's counters) are taken from the site with most examples: their
    mean means nothing. A group that nobody trained stays as it is in ``current``.
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
    """Add ``count`` times ``weights`` to a sum of two arrays, in place."""
    for start in range(0, total.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        a = total[part]
        b = weights[part] * np.float64(count)
        both = a + b
        b_of_it = both - a
        rounded_away[part] += (a - (both - b_of_it)) + (b - b_of_it)
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
    """Average each task group over the sites that trained it, as ``RunningAverage``."""
    average = RunningAverage(current)
    for contribution in contributions:
        average.add(contribution)
    return average.combined()
