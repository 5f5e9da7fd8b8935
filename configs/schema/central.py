"""Settings ``central``: differential privacy of the averages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class CentralConfig(Section):
    """Differential privacy of the averaged model: the consortium's, whose unit is a whole site.

    The coordinator sees each site's weights, and must be trusted to clip them and to add the noise.
    ``privacy`` is the sites' own and needs no such trust. docs/privacy.md tells the two apart.
    """

    mode: Literal["off", "fixed", "adaptive"] = Field(
        "off", description="Clip each site's update, add noise; adaptive: the clip norm learns."
    )
    noise_multiplier: float = Field(
        1.0, gt=0.0, description="Noise on the sum over clip-norm; adaptive: the count's included."
    )
    clip_norm: float = Field(
        1.0, gt=0.0, description="Largest norm of a site's whole update; adaptive: in round 1."
    )
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="Far below 1 over the number of sites.")
    target_clipped_quantile: float = Field(
        0.5, ge=0.0, le=1.0, description="adaptive: share of the sites' updates to be clipped."
    )
    clip_norm_lr: float = Field(
        0.2, gt=0.0, description="adaptive: step of the clip norm's logarithm in a round."
    )
    clipped_count_stddev: float = Field(
        0.0,
        ge=0.0,
        description="adaptive: noise on how many were clipped; 0: sites / 20, or the multiplier.",
    )
