"""The arithmetic that makes one model of the sites' models: plain arrays, no Flower.

Federated averaging (McMahan et al., 2017), task by task: the shared encoder is weighted by each
site's training examples, the segmentation part by its examples with a mask, the classification
head by its examples with a label. A site without masks thus shapes encoder and head, and its
untrained decoder counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_model.packing import Packed, group_of_key
from mtl_model.tasks import Group


@dataclass(frozen=True)
class Contribution:
    """One site's weights after a local round."""

    site: str
    weights: Packed
    counts: Mapping[Group, int]  # training examples that shaped each group's weights


def average_by_task(contributions: Sequence[Contribution], current: Packed) -> Packed:
    """Average each task group over the sites that trained it.

    Sums are taken in float64 and in the order of the sites' names, so that the result does not
    depend on who answered first. Integer arrays (batch norm's counters) are taken from the site
    with most examples: their mean means nothing. A group that nobody trained stays as it is in
    ``current``.
    """
    ordered = sorted(contributions, key=lambda c: c.site)
    averaged: Packed = {}
    for key, before in current.items():
        group = group_of_key(key)
        trained = [(c.weights[key], c.counts[group]) for c in ordered if c.counts[group] > 0]
        if not trained:
            averaged[key] = before
        elif np.issubdtype(before.dtype, np.integer):
            averaged[key] = max(trained, key=lambda pair: pair[1])[0]
        else:
            total = np.zeros(before.shape, np.float64)
            for weights, count in trained:
                total += weights * np.float64(count)
            averaged[key] = (total / sum(count for _, count in trained)).astype(before.dtype)
    return averaged
