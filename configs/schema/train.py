"""Settings ``train``: one local round."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class TrainConfig(Section):
    """One site's local round."""

    local_epochs: int = Field(1, ge=1)
    local_steps: int = Field(0, ge=0, description="Steps a round instead of epochs; 0: epochs.")
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0.0)
    poly_power: float = Field(0.9, ge=0.0, description="lr * (1 - step/steps)^power, whole run.")
    weight_decay: float = Field(3e-5, ge=0.0)
    clip_norm: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0: no clipping.")
    augment: bool = True
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU.")
    grad_checkpointing: bool = Field(
        False, description="Compute activations again instead of keeping them: memory for time."
    )
    compile: bool = Field(
        False, description="torch.compile training; takes minutes at first, and a C++ compiler."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")

    def steps(self, examples: int) -> int:
        """Optimiser steps of one local round; the last batch of an epoch may be smaller."""
        return self.local_steps or self.local_epochs * -(-examples // self.batch_size)
