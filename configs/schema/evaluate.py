"""Settings ``evaluate``: evaluation of the models at the sites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class EvaluateConfig(Section):
    """Evaluation at every site after every round, and the choice of the best round."""

    batch_size: int = Field(
        16, ge=1, description="Images per batch in evaluation. Does not change the result."
    )
    select_by: Literal["score", "dice", "balanced-accuracy", "auc"] = Field(
        "score",
        description="Metric that selects the best round: its value on the pooled validation "
        "images of all sites. score: the mean of dice and balanced-accuracy.",
    )
    hd95: bool = Field(
        False,
        description="Also compute the 95th percentile Hausdorff distance, in pixels. Needs the "
        "extra polyclinic[metrics].",
    )
