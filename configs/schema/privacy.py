"""Settings ``privacy``: differential privacy, added at the sites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class PrivacyConfig(Section):
    """Differential privacy of each site's training images in the weights that the site sends."""

    mode: Literal["off", "dp-sgd"] = Field(
        "off",
        description="Differential privacy at the sites. off: none; dp-sgd: in each step, clip the "
        "gradient of each unit and add noise.",
    )
    unit: Literal["example", "patient"] = Field(
        "patient",
        description="Unit that is protected. example: one image; patient: all images of a patient.",
    )
    target_epsilon: float = Field(
        0.0,
        ge=0.0,
        description="Epsilon that the whole run may spend at each site, from which each site "
        "computes its noise; 0: use privacy.noise-multiplier instead.",
    )
    noise_multiplier: float = Field(
        0.0,
        ge=0.0,
        description="Standard deviation of the noise divided by privacy.clip-norm; 0: compute it "
        "from privacy.target-epsilon.",
    )
    delta: float = Field(
        1e-5,
        gt=0.0,
        lt=1.0,
        description="Delta of the (epsilon, delta) guarantee. Choose it below 1 / the number of "
        "units of a site.",
    )
    clip_norm: float = Field(
        1.0,
        gt=0.0,
        description="L2 norm to which each unit's gradient is clipped in a step. With "
        "privacy.adaptive-clipping, the value at the start of each round.",
    )
    adaptive_clipping: bool = Field(
        False,
        description="Adapt the clipping norm to the units' gradients within each round, starting "
        "from privacy.clip-norm. The accounting includes the privacy that this costs.",
    )
    clip_quantile: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="Share of units with gradients below the clipping norm that adaptive clipping "
        "aims at, 0 to 1. Used with privacy.adaptive-clipping.",
    )
    clip_rate: float = Field(
        0.2,
        gt=0.0,
        description="Learning rate of adaptive clipping: the change of the clipping norm's "
        "logarithm per step. Used with privacy.adaptive-clipping.",
    )
    physical_batch_size: int = Field(
        8,
        ge=1,
        description="Images that are in memory at once. A step processes its batch in parts of "
        "this size, which changes memory and speed but not the result.",
    )
    gradients: Literal["ghost", "hooks"] = Field(
        "ghost",
        description="Method that computes each unit's gradient norm. Both give the same result; "
        "ghost is faster and needs less memory, hooks is Opacus's method.",
    )
