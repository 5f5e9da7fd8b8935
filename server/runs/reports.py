"""What sites say of themselves and of their work, as far as it is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SiteReport:
    """What a site says of itself before the first round."""

    name: str
    examples: dict[str, int]  # by split
    classes: dict[str, list[int]]  # by split, then by class; splits that are not told are absent
    with_mask: dict[str, int]
    with_label: dict[str, int]
    skipped: tuple[str, ...]
    fingerprint: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class TrainReport:
    """What a site says of its local round, beside the weights."""

    steps: int
    seconds: float | None  # None of a site that trains privately
    loss_segmentation: float | None
    loss_classification: float | None
    epsilon: float | None = None  # spent by the site's cohort, this round and all before included
    delta: float | None = None
    budget: float | None = None  # the epsilon that its cohort may ever spend
