"""Compute the epsilon of a run's releases under central differential privacy.

The unit of privacy is a whole site (server/aggregation/central_dp.py). The privacy cost for
patients of the sites' own private training is a different number, which the sites report: the two
are never added, and neither is a bound on the other.

Every site is in every release, so there is no amplification by sampling, and a release with noise
multiplier z is a Gaussian mechanism with signal-to-noise ratio 1/z. Several releases together are
one Gaussian mechanism with ratio mu = sqrt(sum of 1/z^2), also under adaptive composition (Dong,
Roth, Su, "Gaussian Differential Privacy", 2019). Delta follows from epsilon and mu in closed form
(Balle, Wang, 2018). The computation is therefore exact and needs no accounting library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

PRECISION = 1e-9  # largest relative error; the computed epsilon is never below the exact one
_HOPELESS = 1e12  # epsilon above which the exact value is not computed: e^epsilon loses precision


def central_epsilon(noise_multipliers: Iterable[float], delta: float) -> float:
    """Compute the joint epsilon of releases with the given noise multipliers.

    Args:
        noise_multipliers: the noise multiplier of each release.
        delta: the delta of the guarantee, between 0 and 1.

    Returns:
        An epsilon that is never below the exact value and at most ``PRECISION`` (relative) above
        it, or a millionth above it where epsilon is too large to be useful. Infinity without
        noise.

    Raises:
        ValueError: if delta is not in (0, 1), or a multiplier is negative.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number between 0 and 1, got {delta}")
    mu = 0.0
    for noise in noise_multipliers:
        if noise < 0:
            raise ValueError(f"noise multiplier: expected a number of at least 0, got {noise}")
        mu = math.hypot(mu, 1 / noise if noise > 0 else math.inf)
    if mu == 0:
        return 0.0
    lower, upper = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # a loose bound
    if upper > _HOPELESS:
        return upper
    if delta_at(0.0, mu) <= delta:
        return 0.0
    while upper - lower > PRECISION * upper:
        middle = (lower + upper) / 2
        if delta_at(middle, mu) <= delta:
            upper = middle
        else:
            lower = middle
    return upper


def delta_at(epsilon: float, mu: float) -> float:
    """Compute the delta of Gaussian mechanisms with joint signal-to-noise ratio mu > 0."""
    from scipy.special import log_ndtr, ndtr  # takes 0.2 s to import; used only here

    # The product is computed in logarithms, since e^epsilon overflows where the product is small.
    beyond = math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)))
    return float(ndtr(-epsilon / mu + mu / 2)) - beyond
