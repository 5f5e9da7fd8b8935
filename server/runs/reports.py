"""Define the parts of the sites' descriptions and training reports that the coordinator keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SiteReport:
    """A site's description of itself before the first round."""

    name: str
    examples: dict[str, int]  # number of examples per split
    classes: dict[str, list[int]]  # examples per split and class; withheld splits are absent
    with_mask: dict[str, int]  # number of examples with a mask per split
    with_label: dict[str, int]  # number of examples with a label per split
    skipped: tuple[str, ...]  # one sentence per row that could not be used
    fingerprint: str  # digest of the site's data
    device: str  # device that the site trains on
    versions: dict[str, str]  # library: version


@dataclass(frozen=True)
class TrainReport:
    """A site's report on its local training in one round."""

    steps: int  # number of optimiser steps
    seconds: float | None  # duration; None if the site trains privately
    loss_segmentation: float | None  # mean segmentation loss; None if not reported
    loss_classification: float | None  # mean classification loss; None if not reported
    epsilon: float | None = None  # total spent by the site's cohort; None without privacy
    delta: float | None = None  # delta for which epsilon holds
    budget: float | None = None  # largest epsilon that the site's cohort may spend in total
