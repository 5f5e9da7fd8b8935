"""Settings ``loss``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from polyclinic.configs.schema.base import Section


class LossConfig(Section):
    """The two tasks' losses and how they are weighed against each other."""

    segmentation: Literal["dice", "dice+ce", "dice+focal"] = Field(
        "dice", description="Soft Dice alone, or with cross-entropy or focal loss a pixel."
    )
    focal_gamma: float = Field(
        2.0, ge=0.0, description="How much focal loss spares easy pixels; 0: cross-entropy."
    )
    classification: Literal["cross-entropy", "soft-margin"] = Field(
        "cross-entropy", description="soft-margin: each class for itself; multi-label needs it."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of a label given to all classes; soft-margin: to 0.5.",
    )
    classification_weight: float = Field(0.25, ge=0.0, description="Segmentation counts 1.")
    weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed", description="uncertainty: the two weights are learned, from the fixed ones on."
    )
    class_weights: Annotated[
        str, Field(pattern=r"^(none|balanced|\d+(\.\d+)?(,\d+(\.\d+)?)*)$")
    ] = Field(
        "balanced", description="none, balanced (from the site's own labels), or one a class."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weighting == "uncertainty" and self.classification_weight == 0:
            raise ValueError(
                "loss.classification-weight: expected more than 0 for loss.weighting "
                "uncertainty, which starts there, got 0"
            )
        return self
