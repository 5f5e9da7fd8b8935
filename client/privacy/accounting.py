"""How much privacy a history of noisy steps has cost.

A step is the Poisson-subsampled Gaussian mechanism: each unit (an example or a patient) takes part
with some rate, its contribution is clipped, and Gaussian noise is added to the sum. Datasets are
neighbours if one has one unit more. Every number here is an upper bound of the epsilon at a given
delta, so that the smaller of two may be taken.

Opacus computes two. PRV convolves privacy losses and is tight, but it wants memory in proportion
to epsilon and to the root of the steps (gigabytes, where noise is little), overflows at an epsilon
near 700, and falls short of its theory where its own error exceeds 1; there, and wherever numpy
complains, the RDP bound stands alone. It is looser, by 10 % where much is spent and by a multiple
where little is, and works everywhere.

Nothing here reads or writes a file. Opacus takes seconds to import and is imported when needed.
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

PRECISION = 0.001  # relative, of noise_for: never below the noise that is needed, so much above
MOST_NOISE = 1e6  # more is computed as this; beside it the clipped sum is lost anyway
LEAST_NOISE = 1e-3  # less is none; at 1e-160 Opacus's RDP series never ends
LEAST_RATE = 1e-6  # less is computed as this; PRV's density cancels below

# Opacus's orders, and larger ones, which small epsilons need: 63 as the largest cannot go below
# epsilon 0.1 at delta 1e-5. At 1024 its binomials are still finite.
_ORDERS = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(12, 64),
    *(64, 72, 80, 96, 128, 192, 256, 384, 512, 768, 1024),
)
_POINTS = 2**20  # of PRV's grids together: about 100 MB and a second
_STRETCHES = 16  # that PRV composes one by one; each costs as much as the first
_LEAST_DELTA = 1e-10  # of PRV: its sums are doubles, and below this nothing of ours was compared
_LARGEST_LOSS = 690.0  # exp of it, divided by LEAST_RATE, is still a double


@dataclass(frozen=True)
class DpEvent:
    """A stretch of steps of the Poisson-subsampled Gaussian mechanism.

    Attributes:
        noise_multiplier: the noise's deviation over the largest norm of one unit's contribution.
        sample_rate: the probability with which each unit takes part in a step, in (0, 1].
        steps: how many.
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
    """An upper bound of epsilon, and whose."""

    epsilon: float
    by: Literal["prv", "rdp"]


def epsilon(history: Iterable[DpEvent], delta: float) -> float:
    """The smaller of two upper bounds, PRV's where it can be trusted and RDP's.

    Infinity without noise, or with too little for either. Order does not matter, and equal noise
    and rate count as one stretch: a thousand rounds cost no more time than one.

    Raises:
        ValueError: if delta is not in (0, 1).
    """
    return bound(history, delta).epsilon


def epsilon_rdp(history: Iterable[DpEvent], delta: float) -> float:
    """The RDP bound alone: looser, by other means, and never in doubt.

    Raises:
        ValueError: if delta is not in (0, 1).
    """
    return _rdp(_merged(history, delta), delta)


def bound(history: Iterable[DpEvent], delta: float) -> Bound:
    """What ``epsilon`` gives, with whose bound it is.

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
    """The smallest noise multiplier with which steps, composed with ``before``, stay in a target.

    Never too small, and at most ``PRECISION`` too large.

    Raises:
        ValueError: if no noise would do, because ``before`` has spent the target or because the
            steps are too many for it; or if an argument is out of range.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target epsilon: expected a finite number above 0, got {target_epsilon}")
    spent = epsilon(before, delta)
    if spent >= target_epsilon:
        raise ValueError(
            f"epsilon {spent:.4g} of {target_epsilon:.4g} is spent already (delta {delta:g}): no "
            "noise leaves room for another step"
        )

    def cost(noise: float, of: Callable[[Iterable[DpEvent], float], float]) -> float:
        return of((*before, DpEvent(noise, sample_rate, steps)), delta)

    # RDP is quick and never the smaller bound, so what fits by it fits
    enough = 1.0
    while cost(enough, epsilon_rdp) > target_epsilon and enough < MOST_NOISE:
        enough *= 2
    if enough >= MOST_NOISE and cost(MOST_NOISE, epsilon) > target_epsilon:
        raise ValueError(
            f"{steps} steps at rate {sample_rate:g} cannot stay within epsilon "
            f"{target_epsilon:.4g} at delta {delta:g}, of which {spent:.4g} is spent, with any "
            "noise; ask for fewer steps or a larger epsilon"
        )
    if cost(enough, epsilon_rdp) <= target_epsilon:
        enough = _least(enough, 2.0, 1.05, target_epsilon, lambda noise: cost(noise, epsilon_rdp))
    return _least(enough, 1.25, 1 + PRECISION, target_epsilon, lambda noise: cost(noise, epsilon))


def _least(
    enough: float, stride: float, precision: float, target: float, cost: Callable[[float], float]
) -> float:
    """The least noise whose cost is the target at most, to a ratio of precision above it.

    Goes down from what fits in growing strides until something does not, then closes in between
    the two. A second to compute each cost makes it worth guessing: on a double logarithmic scale
    costs are nearly a line, on which the guess is put a little to the safe side.
    """
    cheap, short = cost(enough), enough / stride
    while (dear := cost(short)) <= target:
        stride *= stride
        enough, cheap, short = short, dear, short / stride
    side = 0  # of the last guess; two on one side mean that the line is none, and are halved
    while enough / short > precision:
        guess = math.sqrt(enough * short)
        if 0 < cheap < dear < math.inf and abs(side) < 2:
            along = math.log(dear / target) / math.log(dear / cheap)
            line = short * (enough / short) ** along * precision**0.4
            guess = line if short * precision**0.1 < line < enough / precision**0.1 else guess
        if (found := cost(guess)) <= target:
            enough, cheap, side = guess, found, max(side, 0) + 1
            # where the line was right, all but the precision can be left out in one step
            if enough / short > precision and cost(enough / precision) > target:
                return enough
        else:
            short, dear, side = guess, found, min(side, 0) - 1
    return enough


def _merged(history: Iterable[DpEvent], delta: float) -> tuple[DpEvent, ...]:
    """Stretches in a canonical order, each noise and rate once, none empty.

    Noise and rate are brought within what can be computed, to the costlier side: less noise and a
    higher rate never cost less, since more noise or a second subsampling is post-processing.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")
    steps: dict[tuple[float, float], int] = {}
    for spent in history:
        key = (min(spent.noise_multiplier, MOST_NOISE), max(spent.sample_rate, LEAST_RATE))
        steps[key] = steps.get(key, 0) + spent.steps
    return tuple(DpEvent(*key, count) for key, count in sorted(steps.items()) if count)


def _grouped(stretches: tuple[DpEvent, ...], most: int) -> tuple[DpEvent, ...]:
    """Put like stretches together until few are left, each group at its least noise, highest rate.

    Noise and rate of a group lie within a ratio that grows only as far as it must.
    """
    ratio = 1.005
    while len(stretches) > most:
        groups: dict[tuple[int, int], list[DpEvent]] = {}
        for spent in stretches:
            numbers = (spent.noise_multiplier, spent.sample_rate)
            noise, rate = (math.floor(math.log(value, ratio)) for value in numbers)
            groups.setdefault((noise, rate), []).append(spent)
        stretches = tuple(
            DpEvent(
                min(spent.noise_multiplier for spent in group),
                max(spent.sample_rate for spent in group),
                sum(spent.steps for spent in group),
            )
            for group in groups.values()
        )
        ratio **= 2
    return stretches


@lru_cache(maxsize=4096)
def _bound(stretches: tuple[DpEvent, ...], delta: float) -> Bound:
    rdp = _rdp(stretches, delta)
    if rdp in (0.0, math.inf) or delta < _LEAST_DELTA:
        return Bound(rdp, "rdp")
    prv = _prv(_grouped(stretches, _STRETCHES), delta, rdp)
    return Bound(prv, "prv") if prv is not None and prv < rdp else Bound(rdp, "rdp")


def _prv(stretches: tuple[DpEvent, ...], delta: float, rdp: float) -> float | None:
    """Opacus's PRV bound; None where it would take too much, or cannot be trusted.

    Its grid reaches from -L to L, L being RDP's epsilon at a far smaller delta, with a mesh of
    the allowed error over the root of the steps. The error is chosen here: half a percent of the
    epsilon to be expected, or more where the grid would grow too large.
    """
    import numpy as np
    from opacus.accountants import PRVAccountant
    from scipy.integrate import IntegrationWarning

    delta_error = delta / 1000
    steps = sum(spent.steps for spent in stretches)
    reach = 3 + max(
        _rdp(stretches, delta_error / 4),
        *(_rdp((replace(s, steps=1),), delta_error / (8 * steps)) for s in stretches),
    )
    least = 2 * reach * math.sqrt(steps * math.log(12 / delta_error) / 2) * len(stretches) / _POINTS
    error = max(0.005 * rdp, 1e-4, least)
    if error > 1 or reach > _LARGEST_LOSS:
        return None
    accountant = PRVAccountant()
    accountant.history = [(s.noise_multiplier, s.sample_rate, s.steps) for s in stretches]
    try:
        with (
            warnings.catch_warnings(),
            # at a rate of 1 it takes the logarithm of 0, and means it
            np.errstate(over="raise", invalid="raise", divide="ignore", under="ignore"),
        ):
            warnings.simplefilter("ignore")  # of an order at the end of its range, which is no harm
            warnings.simplefilter("error", RuntimeWarning)
            warnings.simplefilter("error", IntegrationWarning)
            found = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta_error))
    except (ArithmeticError, RuntimeError, ValueError, RuntimeWarning, IntegrationWarning):
        return None
    return max(found, 0.0) if math.isfinite(found) else None


def _rdp(stretches: tuple[DpEvent, ...], delta: float) -> float:
    if not stretches:
        return 0.0
    if stretches[0].noise_multiplier < LEAST_NOISE:  # the smallest comes first
        return math.inf

    import numpy as np
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = np.zeros(len(_ORDERS))
    for spent in stretches:
        total += _rdp_of_a_step(spent.noise_multiplier, spent.sample_rate) * spent.steps
    finite = np.isfinite(total)
    if not finite.any():
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an order at the end of its range
        found, _ = get_privacy_spent(
            orders=np.array(_ORDERS)[finite], rdp=total[finite], delta=delta
        )
    return max(float(found), 0.0)  # the conversion goes below 0 where little is spent


@lru_cache(maxsize=4096)
def _rdp_of_a_step(noise: float, rate: float) -> NDArray[np.float64]:
    """RDP at each of ``_ORDERS``, (orders,); infinity where Opacus's series fails."""
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
