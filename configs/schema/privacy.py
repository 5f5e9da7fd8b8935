"""Settings ``privacy``: differential privacy at the sites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class PrivacyConfig(Section):
    """Differential privacy of what a site's weights tell of its training images."""

    mode: Literal["off", "dp-sgd"] = Field(
        "off", description="dp-sgd: clip what each unit adds to a step, and add noise."
    )
    unit: Literal["example", "patient"] = Field(
        "patient", description="What is protected: one image, or all images of a patient."
    )
    target_epsilon: float = Field(
        0.0, ge=0.0, description="Of the whole run at each site; 0: noise-multiplier is given."
    )
    noise_multiplier: float = Field(
        0.0, ge=0.0, description="Noise over clip-norm; 0: from target-epsilon."
    )
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="Below 1 over a site's units.")
    clip_norm: float = Field(1.0, gt=0.0, description="Most that a unit adds to a step's gradient.")
    adaptive_clipping: bool = Field(
        False,
        description="Let clip-norm, from each round's start, follow the units' gradients; what "
        "that costs is accounted for.",
    )
    clip_quantile: float = Field(
        0.5, gt=0.0, lt=1.0, description="Share of units that adaptive clipping leaves whole."
    )
    clip_rate: float = Field(0.2, gt=0.0, description="Of adaptive clipping, a step.")
    physical_batch_size: int = Field(
        8, ge=1, description="Images at once in memory; a step may take several such."
    )
    gradients: Literal["ghost", "hooks"] = Field(
        "ghost",
        description="How units are told apart, with the same numbers: ghost is faster and "
        "smaller; hooks is Opacus's own way.",
    )
