"""Compute the privacy cost (epsilon at a given delta) of a history of DP-SGD steps.

A step is the Poisson-subsampled Gaussian mechanism: each unit (an example or a patient) is sampled
with a fixed probability, its contribution is clipped, and Gaussian noise is added to the sum. Two
datasets are neighbours if one contains one more unit than the other (add/remove). Every result is
an upper bound of epsilon, so the minimum of two results is also a bound.

Opacus provides two accountants. PRV convolves privacy loss distributions and is tight, but its
memory grows with epsilon and with the square root of the steps (gigabytes if there is little
noise), it overflows at an epsilon near 700, and its guarantee does not hold if its own error
exceeds 1. In these cases, and if numpy reports a numerical error, only the RDP bound is used. RDP
works for all inputs but is looser: by about 10 % at a large epsilon, by a factor at a small one.

This module reads and writes no files. Opacus takes seconds to import and is imported when needed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PRECISION = 0.001  # relative error of noise_for, which only errs towards more noise
MAX_NOISE = 1e6  # larger multipliers are clamped to this; no signal is left at that point
MIN_NOISE = 1e-3  # smaller counts as no noise; at 1e-160 Opacus's RDP series never ends
MIN_RATE = 1e-6  # smaller rates are clamped to this; PRV's density suffers cancellation below it

# RDP orders: Opacus's defaults, extended because small epsilons need large orders. With 63 as the
# largest order, epsilon cannot go below 0.1 at delta 1e-5. Opacus's binomials are finite at 1024.
_ORDERS = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(12, 64),
    *(64, 72, 80, 96, 128, 192, 256, 384, 512, 768, 1024),
)
_POINTS = 2**20  # points of all PRV grids together: about 100 MB and one second
_MAX_EVENTS = 16  # events that PRV composes, at equal cost each; further ones are merged
_MIN_DELTA = 1e-10  # smallest delta for PRV, which sums doubles; smaller ones are untested
_LARGEST_LOSS = 690.0  # exp(loss) / MIN_RATE must be a finite double


@dataclass(frozen=True)
class DpEvent:
    """A number of identical steps of the Poisson-subsampled Gaussian mechanism.

    Attributes:
        noise_multiplier: standard deviation of the noise, divided by the clipping norm.
        sample_rate: probability with which each unit is sampled in a step, in (0, 1].
        steps: number of steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(
                f"noise multiplier: expected a finite number from 0, got {self.noise_multiplier}"
            )
        if not 0 < self.sample_rate <= 1:
            raise ValueError(
                f"sample rate: expected more than 0, at most 1, got {self.sample_rate}"
            )
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"steps: expected a whole number from 0, got {self.steps!r}")


@dataclass(frozen=True)
class Bound:
    """An upper bound of epsilon and the accountant that computed it."""

    epsilon: float
    by: Literal["prv", "rdp"]


def epsilon(history: Iterable[DpEvent], delta: float) -> float:
    """Compute epsilon: the smaller of the PRV bound, where it is reliable, and the RDP bound.

    The result is infinite without noise or with too little noise for both accountants. The order
    of events does not matter. Events with equal noise and rate are merged, so a thousand rounds
    take no longer to compute than one.

    Raises:
        ValueError: if delta is not in (0, 1).
    """
    return bound(history, delta).epsilon


def epsilon_rdp(history: Iterable[DpEvent], delta: float) -> float:
    """Compute the RDP bound only: looser than PRV, but an independent check for all inputs.

    Raises:
        ValueError: if delta is not in (0, 1).
    """
    return _rdp(_merged(history, delta), delta)


def bound(history: Iterable[DpEvent], delta: float) -> Bound:
    """Compute the same value as ``epsilon`` and name the accountant that gave it.

    Raises:
        ValueError: if delta is not in (0, 1).
    """
    return _bound(_merged(history, delta), delta)


def noise_for(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    before: Sequence[DpEvent] = (),
) -> float:
    """Find the smallest noise multiplier that keeps the total epsilon within a target.

    The result is never too small, and at most a relative ``PRECISION`` too large.

    Args:
        target_epsilon: largest epsilon of ``before`` and the new steps together.
        delta: delta of that epsilon, in (0, 1).
        sample_rate: sampling probability per unit and step, in (0, 1].
        steps: number of new steps.
        before: events that are already spent.

    Raises:
        ValueError: if no noise multiplier is large enough, because ``before`` has spent the target
            or because there are too many steps; or if an argument is out of range.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target epsilon: expected a finite number above 0, got {target_epsilon}")
    spent = epsilon(before, delta)
    if spent >= target_epsilon:
        raise ValueError(
            f"epsilon {spent:.4g} of {target_epsilon:.4g} is spent already (delta {delta:g}): no "
            "amount of noise allows another step"
        )

    def cost(noise: float, of: Callable[[Iterable[DpEvent], float], float]) -> float:
        return of((*before, DpEvent(noise, sample_rate, steps)), delta)

    # RDP is fast and never smaller than the final bound: what fits by RDP fits
    enough = 1.0
    while cost(enough, epsilon_rdp) > target_epsilon and enough < MAX_NOISE:
        enough *= 2
    if enough >= MAX_NOISE and cost(MAX_NOISE, epsilon) > target_epsilon:
        raise ValueError(
            f"{steps} steps at rate {sample_rate:g} cannot stay within epsilon "
            f"{target_epsilon:.4g} at delta {delta:g} ({spent:.4g} is spent already) with any "
            "amount of noise; use fewer steps or a larger epsilon"
        )
    if cost(enough, epsilon_rdp) <= target_epsilon:
        enough = _least(enough, 2.0, 1.05, target_epsilon, lambda noise: cost(noise, epsilon_rdp))
    return _least(enough, 1.25, 1 + PRECISION, target_epsilon, lambda noise: cost(noise, epsilon))


def _least(
    enough: float, stride: float, precision: float, target: float, cost: Callable[[float], float]
) -> float:
    """Find the least noise that costs at most the target, up to a factor of ``precision``.

    The search goes down from ``enough`` in growing strides until a noise costs too much, then
    narrows the bracket between the two. Each cost takes about a second, so the next guess is
    interpolated: log cost is almost linear in log noise. The guess is shifted slightly towards
    more noise.

    Args:
        enough: noise multiplier that is known to fit.
        stride: factor of the first step down.
        precision: largest ratio of the result to the optimum, above 1.
        target: largest allowed cost.
        cost: cost of a noise multiplier, which must not increase with the noise.
    """
    low_cost, short = cost(enough), enough / stride
    while (high_cost := cost(short)) <= target:
        stride *= stride
        enough, low_cost, short = short, high_cost, short / stride
    side = 0  # guesses in a row on one side (sign); after two, bisect: the curve is not linear
    while enough / short > precision:
        guess = math.sqrt(enough * short)
        if 0 < low_cost < high_cost < math.inf and abs(side) < 2:
            along = math.log(high_cost / target) / math.log(high_cost / low_cost)
            line = short * (enough / short) ** along * precision**0.4
            guess = line if short * precision**0.1 < line < enough / precision**0.1 else guess
        if (found := cost(guess)) <= target:
            enough, low_cost, side = guess, found, max(side, 0) + 1
            # a good guess lies within the precision of the optimum: stop if slightly less fails
            if enough / short > precision and cost(enough / precision) > target:
                return enough
        else:
            short, high_cost, side = guess, found, min(side, 0) - 1
    return enough


def _merged(history: Iterable[DpEvent], delta: float) -> tuple[DpEvent, ...]:
    """Merge events of equal noise and rate, drop empty ones and sort by noise and rate.

    Noise and rate are clamped to the range that can be computed, towards the higher cost. Less
    noise or a higher rate never costs less: adding noise is post-processing, and further
    subsampling does not increase the cost.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")
    steps: dict[tuple[float, float], int] = {}
    for spent in history:
        key = (min(spent.noise_multiplier, MAX_NOISE), max(spent.sample_rate, MIN_RATE))
        steps[key] = steps.get(key, 0) + spent.steps
    return tuple(DpEvent(*key, count) for key, count in sorted(steps.items()) if count)


def _grouped(events: tuple[DpEvent, ...], most: int) -> tuple[DpEvent, ...]:
    """Combine similar events until at most ``most`` remain.

    A group uses its smallest noise and its highest rate, which never understates the cost. The
    ratio within which events are similar starts at 1.005 and grows only as needed.
    """
    ratio = 1.005
    while len(events) > most:
        groups: dict[tuple[int, int], list[DpEvent]] = {}
        for spent in events:
            numbers = (spent.noise_multiplier, spent.sample_rate)
            noise, rate = (math.floor(math.log(value, ratio)) for value in numbers)
            groups.setdefault((noise, rate), []).append(spent)
        events = tuple(
            DpEvent(
                min(spent.noise_multiplier for spent in group),
                max(spent.sample_rate for spent in group),
                sum(spent.steps for spent in group),
            )
            for group in groups.values()
        )
        ratio **= 2
    return events


@lru_cache(maxsize=4096)
def _bound(events: tuple[DpEvent, ...], delta: float) -> Bound:
    rdp = _rdp(events, delta)
    if rdp in (0.0, math.inf) or delta < _MIN_DELTA:
        return Bound(rdp, "rdp")
    prv = _prv(_grouped(events, _MAX_EVENTS), delta, rdp)
    return Bound(prv, "prv") if prv is not None and prv < rdp else Bound(rdp, "rdp")


def _prv(events: tuple[DpEvent, ...], delta: float, rdp: float) -> float | None:
    """Compute Opacus's PRV bound; return None if it needs too much memory or is unreliable.

    The grid spans [-L, L], where L is RDP's epsilon at a far smaller delta. Its mesh is the allowed
    error divided by the square root of the steps. The allowed error is half a percent of the
    expected epsilon, or more if the grid would become too large.
    """
    import numpy as np
    from opacus.accountants import PRVAccountant
    from scipy.integrate import IntegrationWarning

    delta_error = delta / 1000
    steps = sum(spent.steps for spent in events)
    reach = 3 + max(
        _rdp(events, delta_error / 4),
        *(_rdp((replace(s, steps=1),), delta_error / (8 * steps)) for s in events),
    )
    least = 2 * reach * math.sqrt(steps * math.log(12 / delta_error) / 2) * len(events) / _POINTS
    error = max(0.005 * rdp, 1e-4, least)
    if error > 1 or reach > _LARGEST_LOSS:
        return None
    accountant = PRVAccountant()
    accountant.history = [(s.noise_multiplier, s.sample_rate, s.steps) for s in events]
    try:
        with (
            warnings.catch_warnings(),
            # at a sample rate of 1, Opacus takes log(0) on purpose
            np.errstate(over="raise", invalid="raise", divide="ignore", under="ignore"),
        ):
            warnings.simplefilter("ignore")  # the best order is the largest, which is harmless
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("error", IntegrationWarning)
            found = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))
    except (ArithmeticError, RuntimeError, ValueError, RuntimeWarning, IntegrationWarning):
        return None
    return max(found, 0.0) if math.isfinite(found) else None


def _rdp(events: tuple[DpEvent, ...], delta: float) -> float:
    if not events:
        return 0.0
    if events[0].noise_multiplier < MIN_NOISE:  # the smallest comes first
        return math.inf

    import numpy as np
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = np.zeros(len(_ORDERS))
    for spent in events:
        total += _rdp_of_a_step(spent.noise_multiplier, spent.sample_rate) * spent.steps
    finite = np.isfinite(total)
    if not finite.any():
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order is the largest or the smallest
        found, _ = get_privacy_spent(
            orders=np.array(_ORDERS)[finite], rdp=total[finite], delta=delta
        )
    return max(float(found), 0.0)  # the conversion can be negative if little is spent


@lru_cache(maxsize=4096)
def _rdp_of_a_step(noise: float, rate: float) -> NDArray[np.float64]:
    """Compute one step's RDP at each of ``_ORDERS``, (orders,); infinite if the series fails."""
    import numpy as np
    from opacus.accountants.analysis.rdp import compute_rdp

    def at(order: float) -> float:
        try:
            with np.errstate(all="ignore"):
                found = float(
                    compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(order))
                )
        except (ArithmeticError, ValueError):
            return math.inf
        return max(found, 0.0) if math.isfinite(found) else math.inf

    return np.array([at(order) for order in _ORDERS])
