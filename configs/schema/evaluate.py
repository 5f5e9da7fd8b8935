"""Settings ``evaluate``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class EvaluateConfig(Section):
    """Evaluation at every site after every round, and which round's model is called best."""

    batch_size: int = Field(16, ge=1)
    select_by: Literal["score", "dice", "balanced-accuracy", "auc"] = Field(
        "score", description="Pooled value on val; score: mean of dice and balanced-accuracy."
    )
    hd95: bool = Field(
        False, description="95th percentile Hausdorff distance, pixels; wants polyclinic[metrics]."
    )
