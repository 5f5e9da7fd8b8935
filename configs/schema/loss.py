"""Settings ``loss``: the loss of each task and their weights."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from polyclinic.configs.schema.base import Section


class LossConfig(Section):
    """The losses of the two tasks and their weights."""

    segmentation: Literal["dice", "dice+ce", "dice+focal"] = Field(
        "dice",
        description="Segmentation loss. dice: soft Dice; dice+ce: soft Dice plus cross-entropy per "
        "pixel; dice+focal: soft Dice plus focal loss per pixel.",
    )
    focal_gamma: float = Field(
        2.0,
        ge=0.0,
        description="Exponent of the focal loss. The larger it is, the less easy pixels count; 0: "
        "cross-entropy. Used with loss.segmentation dice+focal.",
    )
    classification: Literal["cross-entropy", "soft-margin"] = Field(
        "cross-entropy",
        description="Classification loss. cross-entropy: one class per image; soft-margin: each "
        "class independently, which data.label-kind multi-label requires.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of each label that is spread over all classes (cross-entropy) or moved "
        "to 0.5 (soft-margin); 0: no smoothing.",
    )
    classification_weight: float = Field(
        0.25,
        ge=0.0,
        description="Weight of the classification loss. The segmentation loss has weight 1; 0: no "
        "classification loss.",
    )
    weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed",
        description="Weighting of the two losses. fixed: as loss.classification-weight says; "
        "uncertainty: the weights are learned, starting from the fixed ones.",
    )
    class_weights: Annotated[
        str, Field(pattern=r"^(none|balanced|\d+(\.\d+)?(,\d+(\.\d+)?)*)$")
    ] = Field(
        "balanced",
        description="Weights of the classes in the classification loss. none: 1 each; balanced: "
        "inverse to the class frequencies in the site's training labels; or one number per class "
        "in the order of data.classes, as 1,2.5.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weighting == "uncertainty" and self.classification_weight == 0:
            raise ValueError(
                "loss.classification-weight: expected more than 0 for loss.weighting "
                "uncertainty, which starts from this weight, got 0"
            )
        return self
