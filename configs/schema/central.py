"""Settings ``central``: differential privacy of the averaged model, added by the coordinator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class CentralConfig(Section):
    """Central differential privacy: the averaged model protects each site as one unit.

    The coordinator sees each site's weights and must be trusted to clip them and to add the noise.
    The settings ``privacy`` add noise at the sites and need no such trust. docs/privacy.md compares
    the two.
    """

    mode: Literal["off", "fixed", "adaptive"] = Field(
        "off",
        description="Central differential privacy. off: none; fixed: clip each site's update to "
        "central.clip-norm and add noise; adaptive: the same with a clipping norm that follows the "
        "updates' norms.",
    )
    noise_multiplier: float = Field(
        1.0,
        gt=0.0,
        description="Standard deviation of the noise on the sum of the sites' updates, divided by "
        "the clipping norm. With central.mode adaptive, the noise on the count of clipped updates "
        "is part of it.",
    )
    clip_norm: float = Field(
        1.0,
        gt=0.0,
        description="L2 norm to which a site's whole update is clipped. With central.mode "
        "adaptive, the value of round 1.",
    )
    delta: float = Field(
        1e-5,
        gt=0.0,
        lt=1.0,
        description="Delta of the (epsilon, delta) guarantee per site. Choose it far below 1 / the "
        "number of sites.",
    )
    target_clipped_quantile: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="Share of the sites' updates that should be clipped, 0 to 1. Used with "
        "central.mode adaptive.",
    )
    clip_norm_lr: float = Field(
        0.2,
        gt=0.0,
        description="Learning rate of the clipping norm: the step of its logarithm per round. Used "
        "with central.mode adaptive.",
    )
    clipped_count_stddev: float = Field(
        0.0,
        ge=0.0,
        description="Standard deviation of the noise on the number of clipped updates; 0: the "
        "number of sites / 20 or central.noise-multiplier, whichever is larger. Used with "
        "central.mode adaptive.",
    )
