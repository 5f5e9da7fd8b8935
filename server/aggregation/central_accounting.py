"""The epsilon of a run's releases under central differential privacy.

This is the account of central differential privacy (server/aggregation/central_dp.py), whose unit
is a whole site. What the sites' own trainings cost their patients is told by the sites and is
another number: the two are never added, nor is one a bound of the other.

Every site is in every release, so that no sampling helps, and a release with noise multiplier z is
the Gaussian mechanism of signal-to-noise ratio 1/z. Several are together one of ratio
mu = sqrt(sum of 1/z^2), also where each depends on those before it (Dong, Roth, Su, "Gaussian
Differential Privacy", 2019), and delta follows from epsilon and mu in closed form (Balle, Wang,
2018). So this is exact, and needs no accountant's library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

PRECISION = 1e-9  # relative; the epsilon that is found lies above the true one
_HOPELESS = 1e12  # of epsilon: from here on e^epsilon's digits are lost, and nobody misses them


def central_epsilon(noise_multipliers: Iterable[float], delta: float) -> float:
    """The epsilon at which releases with these noise multipliers are together private.

    Never below the exact value, and at most ``PRECISION`` above it, or a millionth where epsilon is
    beyond all use. Infinity without noise.

    Raises:
        ValueError: if delta is not in (0, 1), or a multiplier is negative.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")
    mu = 0.0
    for noise in noise_multipliers:
        if noise < 0:
            raise ValueError(f"noise multiplier: expected a number from 0, got {noise}")
        mu = math.hypot(mu, 1 / noise if noise > 0 else math.inf)
    if mu == 0:
        return 0.0
    short, enough = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # a looser bound
    if enough > _HOPELESS:
        return enough
    if delta_at(0.0, mu) <= delta:
        return 0.0
    while enough - short > PRECISION * enough:
        middle = (short + enough) / 2
        if delta_at(middle, mu) <= delta:
            enough = middle
        else:
            short = middle
    return enough


def delta_at(epsilon: float, mu: float) -> float:
    """The delta of Gaussian mechanisms that together have signal-to-noise ratio mu > 0."""
    from scipy.special import log_ndtr, ndtr  # a fifth of a second, not for every reader's sake

    # e^epsilon alone would overflow where the product is small
    beyond = math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)))
    return float(ndtr(-epsilon / mu + mu / 2)) - beyond
