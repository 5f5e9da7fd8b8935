"""Enforce the policy of site.yaml, whatever the server requests.

Each ``check_*`` function returns nothing or raises ``Decline`` with the rule and the requested
value. The other functions remove what must not leave the site. They are called as early as
possible: a request is checked before any image is read, steps and noise before the first step, and
an update before it is packed into a reply.
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
    """A rule of the site forbids a request. The message names the rule and the values."""


def check_release(policy: PolicyConfig, release: str) -> None:
    """Check that the site has approved the running code.

    Args:
        policy: the site's policy.
        release: digest of the running code.
    """
    if policy.releases is not None and release not in policy.releases:
        raise Decline(
            f"policy.releases: this site has not approved release {release}; it allows "
            f"{', '.join(each[:12] for each in policy.releases) or 'none'}"
        )


def check_hours(policy: PolicyConfig, now: datetime) -> None:
    """Check that the time is within the site's opening hours.

    Args:
        policy: the site's policy.
        now: current time in the site's time zone.
    """
    if policy.hours is None:
        return
    start, end = opening_hours(policy.hours)
    time = now.time()
    inside = start <= time < end if start < end else time >= start or time < end
    if not inside:
        raise Decline(f"policy.hours: this site's hours are {policy.hours}, it is now {time:%H:%M}")


def check_evaluation(policy: PolicyConfig) -> None:
    """Check that the site permits evaluation on its images."""
    if not policy.evaluation:
        raise Decline("policy.evaluation: this site does not allow evaluation")


def check_private_site(site: SiteConfig, config: RunConfig) -> None:
    """Decline runs without differential privacy at a site that has a cohort or a budget.

    Called for every kind of message, before any row or image is read. If ``privacy.mode`` were off,
    or if the run could choose how patients are split, descriptions and evaluations would be enough
    to reveal which patients are in the training split.
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
    """Check that the run's unit of privacy protects at least the site's unit."""
    if privacy.unit == "example" and budget.unit == "patient":
        raise Decline(
            "privacy.unit: this site protects patients (site.yaml: budget.unit), the run only "
            "protects single examples"
        )


def check_size(policy: PolicyConfig, examples: int, patients: int) -> None:
    """Check that the site has enough training images and patients to hide a single one."""
    for key, found in (("examples", examples), ("patients", patients)):
        least = getattr(policy, f"min_{key}")
        if found < least:
            raise Decline(
                f"policy.min-{key}: this site trains with at least {least} {key}, it has {found}"
            )


def check_steps(policy: PolicyConfig, steps: int) -> None:
    """Check the number of steps per round."""
    if policy.max_steps is not None and steps > policy.max_steps:
        raise Decline(
            f"policy.max-steps: this site runs at most {policy.max_steps} steps per round, the "
            f"run asks for {steps}"
        )


def check_noise(policy: PolicyConfig, noise_multiplier: float) -> None:
    """Check the noise multiplier of a private round, regardless of the budget."""
    if noise_multiplier < policy.min_noise_multiplier:
        raise Decline(
            "policy.min-noise-multiplier: this site adds noise of at least "
            f"{policy.min_noise_multiplier:g} times the clipping norm, the run asks for "
            f"{noise_multiplier:.4g}"
        )


def check_update(policy: PolicyConfig, before: Packed, after: Packed) -> None:
    """Check the size of the trained weights, and the L2 norm of their change in the round.

    Args:
        policy: the site's policy.
        before: weights that the server sent.
        after: weights after training.
    """
    size = sum(array.nbytes for array in after.values()) / 1e6
    if policy.max_update_mb is not None and size > policy.max_update_mb:
        raise Decline(
            f"policy.max-update-mb: this site sends at most {policy.max_update_mb:g} MB, these "
            f"weights have {size:.1f}"
        )
    if policy.max_update_norm is None:
        return
    norm = float(np.sqrt(sum(_square(after[key], before[key]) for key in after)))
    if norm > policy.max_update_norm:
        raise Decline(
            f"policy.max-update-norm: this site sends updates with a norm of at most "
            f"{policy.max_update_norm:g}, this round's norm is {norm:.4g}"
        )


def _square(after: NDArray[Any], before: NDArray[Any]) -> float:
    if not np.issubdtype(after.dtype, np.floating):
        return 0.0  # integer buffers, such as batch counters
    return float(np.square(after.astype(np.float64) - before).sum())


def restrict_to_allowed_tasks(policy: PolicyConfig, data: SiteData) -> SiteData:
    """Remove the annotations of tasks that the policy does not allow."""
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
    """Remove the annotations of groups that are too small to evaluate.

    A group is the images of a class, the images that show a mask class, or the images that are
    annotated for a mask class and do not show it. Metric sums over a group with fewer than
    ``policy.min-support`` images would reveal too much of each image.

    Returns:
        The examples, and a description of each withheld group for the server to log.
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
    words += [f"{kind}: excluded by policy" for kind in _METRICS if kind not in policy.metrics]
    return replace(examples, has_label=has_label, has_mask=has_mask), tuple(words)


_METRICS = ("segmentation", "classification", "scores", "distances")


def redact_sums(policy: PolicyConfig, sums: MetricSums) -> MetricSums:
    """Set the sums to zero that the policy does not allow to leave the site."""
    zeros: Mapping[str, NDArray[np.float64]] = {
        name: np.zeros_like(getattr(sums, name))
        for kind, names in (("scores", ("scores",)), ("distances", ("hd95", "hd95_images")))
        if kind not in policy.metrics
        for name in names
    }
    return replace(sums, **zeros)


def redact_counts(policy: PolicyConfig, counts: NDArray[np.int64]) -> list[int]:
    """Set class counts below ``policy.min-support`` to zero."""
    return [int(n) if n >= policy.min_support else 0 for n in counts]


def redact_reason(policy: PolicyConfig, reason: str) -> str:
    """Replace a reason that may contain file names, unless the policy allows them."""
    return reason if policy.name_files else UNNAMED


def redact_skipped(policy: PolicyConfig, skipped: tuple[str, ...]) -> tuple[str, ...]:
    """Replace messages about skipped rows by their number, unless the policy allows file names."""
    if policy.name_files or not skipped:
        return skipped
    return (f"{len(skipped)} rows; see the site's log for the rows and reasons",)


UNNAMED = "its images or settings cannot be used; see the site's log for the reason"

# Policy of simulated sites, since their images are on the coordinator's own machine.
OPEN = PolicyConfig(min_support=1, name_files=True)
