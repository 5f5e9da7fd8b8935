"""What the site allows, whatever the server asks: site.yaml's policy, applied.

Plain functions, each of which returns nothing or raises ``Decline`` with what the policy says and
what was asked; ``suppress_small_groups`` and ``restrict_to_allowed_tasks`` take away what may not
leave. They are called where the thing in question is first known: a request before any image is
read, steps and noise before the first step, an update before it is packed into a reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.client.data.dataset import Examples, SiteData
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.site import BudgetConfig, PolicyConfig, SiteConfig, opening_hours
from polyclinic.mtl_model.packing import Packed
from polyclinic.mtl_model.sums import MetricSums


class Decline(Exception):
    """The site's own rules say no. The message says which, and with what numbers."""


def check_release(policy: PolicyConfig, release: str) -> None:
    """Whether the code that runs is one that the site approved."""
    if policy.releases is not None and release not in policy.releases:
        raise Decline(
            f"policy.releases: this site has not approved release {release}; it allows "
            f"{', '.join(each[:12] for each in policy.releases) or 'none'}"
        )


def check_hours(policy: PolicyConfig, now: datetime) -> None:
    """Whether the site works at this time of day.

    Args:
        now: in the site's local time.
    """
    if policy.hours is None:
        return
    start, end = opening_hours(policy.hours)
    time = now.time()
    inside = start <= time < end if start < end else time >= start or time < end
    if not inside:
        raise Decline(f"policy.hours: this site works {policy.hours}, now it is {time:%H:%M}")


def check_evaluation(policy: PolicyConfig) -> None:
    """Whether models may be tested on the site's images."""
    if not policy.evaluation:
        raise Decline("policy.evaluation: this site evaluates no models")


def check_private_site(site: SiteConfig, config: RunConfig) -> None:
    """Decline a run that a site with a cohort or a budget must not answer, whatever it asks.

    Called for every kind of message, before any row or image is read: with ``privacy.mode`` off,
    or with the right to divide the site's patients, descriptions and evaluations alone would
    reveal who is among the training patients.
    """
    if not site.private:
        return
    if config.privacy.mode == "off":
        key = "budget" if site.budget is not None else "cohort"
        raise Decline(
            f"{key}: this site only answers runs with differential privacy (its site.yaml has a "
            f"{key}), the run has privacy.mode off"
        )
    if site.data is not None and (found := site.data.differences(config.data)):
        raise Decline("; ".join(found))


def check_unit(budget: BudgetConfig, privacy: PrivacyConfig) -> None:
    """Whether the run protects at least what the site protects."""
    if privacy.unit == "example" and budget.unit == "patient":
        raise Decline(
            "privacy.unit: this site protects patients (site.yaml: budget.unit), the run asks for "
            "example"
        )


def check_size(policy: PolicyConfig, examples: int, patients: int) -> None:
    """Whether there are enough images and patients for one to be lost among them."""
    for key, found in (("examples", examples), ("patients", patients)):
        least = getattr(policy, f"min_{key}")
        if found < least:
            raise Decline(
                f"policy.min-{key}: this site trains with {least} {key} or more, it has {found}"
            )


def check_steps(policy: PolicyConfig, steps: int) -> None:
    """Whether a round is not too long."""
    if policy.max_steps is not None and steps > policy.max_steps:
        raise Decline(
            f"policy.max-steps: this site takes {policy.max_steps} steps a round at most, the "
            f"run asks for {steps}"
        )


def check_noise(policy: PolicyConfig, noise_multiplier: float) -> None:
    """Whether a private round has noise enough, whatever it costs."""
    if noise_multiplier < policy.min_noise_multiplier:
        raise Decline(
            "policy.min-noise-multiplier: this site adds noise of "
            f"{policy.min_noise_multiplier:g} times the "
            f"clipping norm or more, the run asks for {noise_multiplier:.4g}"
        )


def check_update(policy: PolicyConfig, before: Packed, after: Packed) -> None:
    """Whether what a round made of the weights may leave."""
    size = sum(array.nbytes for array in after.values()) / 1e6
    if policy.max_update_mb is not None and size > policy.max_update_mb:
        raise Decline(
            f"policy.max-update-mb: this site sends {policy.max_update_mb:g} MB at most, these "
            f"weights have {size:.1f}"
        )
    if policy.max_update_norm is None:
        return
    norm = float(np.sqrt(sum(_square(after[key], before[key]) for key in after)))
    if norm > policy.max_update_norm:
        raise Decline(
            f"policy.max-update-norm: this site sends updates of norm "
            f"{policy.max_update_norm:g} at most, this round's has {norm:.4g}"
        )


def _square(after: NDArray[Any], before: NDArray[Any]) -> float:
    if not np.issubdtype(after.dtype, np.floating):
        return 0.0  # counters
    return float(np.square(after.astype(np.float64) - before).sum())


def restrict_to_allowed_tasks(policy: PolicyConfig, data: SiteData) -> SiteData:
    """The site's data with the annotations of the policy's tasks alone."""
    if set(policy.tasks) == {"segmentation", "classification"}:
        return data
    return replace(
        data,
        splits={
            name: replace(
                examples,
                has_mask=examples.has_mask & ("segmentation" in policy.tasks),
                has_label=examples.has_label & ("classification" in policy.tasks),
            )
            for name, examples in data.splits.items()
        },
    )


def suppress_small_groups(
    policy: PolicyConfig, examples: Examples, data: DataConfig
) -> tuple[Examples, tuple[str, ...]]:
    """Images to evaluate on, those of too rare a kind taken as not annotated.

    A kind is: an image class; images that show a mask class; images annotated for it that do not
    show it. Sums over few images of a kind would tell of each.

    Returns:
        The examples, and what is withheld, for the server to tell.
    """
    least, words = policy.min_support, []
    has_label, has_mask = examples.has_label.copy(), examples.has_mask.copy()
    if "classification" not in policy.metrics:
        has_label[:] = False
    if "segmentation" not in policy.metrics:
        has_mask[:] = False
    for k, name in enumerate(data.classes):
        rare = has_label & (examples.labels[:, k] == 1)
        if 0 < rare.sum() < least:
            has_label &= ~rare
            words.append(f"classification of {name}: fewer than {least} images")
    for k, name in enumerate(data.mask_classes):
        shown = examples.masks[..., k].any(axis=(1, 2))
        for kind, which in (("with", shown), ("without", ~shown)):
            rare = has_mask[:, k] & which
            if 0 < rare.sum() < least:
                has_mask[:, k] &= ~rare
                words.append(f"segmentation of images {kind} {name}: fewer than {least} images")
    if 0 < has_label.sum() < least:
        has_label[:] = False
    words += [f"{kind}: by policy" for kind in _METRICS if kind not in policy.metrics]
    return replace(examples, has_label=has_label, has_mask=has_mask), tuple(words)


_METRICS = ("segmentation", "classification", "scores", "distances")


def redact_sums(policy: PolicyConfig, sums: MetricSums) -> MetricSums:
    """The sums without those kinds that the policy keeps at home."""
    zeros: Mapping[str, NDArray[np.float64]] = {
        name: np.zeros_like(getattr(sums, name))
        for kind, names in (("scores", ("scores",)), ("distances", ("hd95", "hd95_images")))
        if kind not in policy.metrics
        for name in names
    }
    return replace(sums, **zeros)


def redact_counts(policy: PolicyConfig, counts: NDArray[np.int64]) -> list[int]:
    """Images by class; those of too rare a class count as none."""
    return [int(n) if n >= policy.min_support else 0 for n in counts]


def redact_reason(policy: PolicyConfig, reason: str) -> str:
    """A reason that may name files, as it goes to the server."""
    return reason if policy.name_files else UNNAMED


def redact_skipped(policy: PolicyConfig, skipped: tuple[str, ...]) -> tuple[str, ...]:
    """Rows left out, as they are told to the server."""
    if policy.name_files or not skipped:
        return skipped
    return (f"{len(skipped)} rows; the site's log says which and why",)


UNNAMED = "its images or settings cannot be used; the site's log says why"

# Of simulated sites, whose images are on the coordinator's own machine.
OPEN = PolicyConfig(min_support=1, name_files=True)
