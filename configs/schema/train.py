"""Settings ``train``: training at one site in one round."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section


class TrainConfig(Section):
    """Training at one site in one round."""

    local_epochs: int = Field(
        1, ge=1, description="Epochs that each site trains in a round, if train.local-steps is 0."
    )
    local_steps: int = Field(
        0,
        ge=0,
        description="Optimiser steps that each site trains in a round; 0: train.local-epochs "
        "decides.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        description="Images per optimiser step. With privacy.mode dp-sgd, the average number.",
    )
    learning_rate: float = Field(
        1e-3, gt=0.0, description="Learning rate of the sites' AdamW optimiser at the first step."
    )
    poly_power: float = Field(
        0.9,
        ge=0.0,
        description="Exponent p of the learning rate's decay over the whole run, learning-rate * "
        "(1 - step / steps)^p; 0: constant.",
    )
    weight_decay: float = Field(
        3e-5, ge=0.0, description="Weight decay of the sites' AdamW optimiser; 0: none."
    )
    clip_norm: float = Field(
        1.0,
        ge=0.0,
        description="L2 norm to which the gradient of a step is clipped; 0: no clipping. With "
        "privacy.mode dp-sgd, privacy.clip-norm is used instead.",
    )
    augment: bool = Field(True, description="Augment training images at random.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Number format of the forward pass. auto: bf16 on a GPU that "
        "supports it, otherwise fp32.",
    )
    grad_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass instead of storing them: less "
        "memory, more time.",
    )
    compile: bool = Field(
        False,
        description="Compile the training step with torch.compile. The first steps take minutes; "
        "needs a C++ compiler.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Device that sites train on: cpu, cuda or cuda:N. auto: a GPU if there is one.",
    )

    def steps(self, examples: int) -> int:
        """Return the optimiser steps of one round; the last batch of an epoch may be smaller."""
        return self.local_steps or self.local_epochs * -(-examples // self.batch_size)
