"""Learned weights of the two tasks' losses.

Paper: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018. A
task's loss is multiplied by exp(-s), where s is its learned log variance, and s / 2 is added to
penalise small weights. In contrast to the paper, training is federated: a site without annotations
for a task does not change that task's s, and the server averages each s over the sites that
trained it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogVariance(nn.Module):
    """The learned log variance s of one task.

    This is a separate module that takes the batch as an argument and returns one copy of s per
    example, so that per-example gradients of s can be computed. Opacus captures this gradient only
    if the examples themselves do not require a gradient, which holds for images.

    Args:
        start: initial value of s.

    Shapes:
        in:  (B, ...), only B is used
        out: (B, 1), a view with the same value for every example
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([start]))

    def forward(self, examples: Tensor) -> Tensor:
        return self.value.expand(examples.shape[0], 1)


class Uncertainty(nn.Module):
    """The learned log variances of both tasks.

    Args:
        segmentation: initial weight of the segmentation loss, greater than 0.
        classification: initial weight of the classification loss, greater than 0.

    Shapes:
        in:  (B, ...), only B is used
        out: (B, 2), segmentation first
    """

    def __init__(self, segmentation: float, classification: float) -> None:
        super().__init__()
        self.segmentation = LogVariance(math.log(1 / segmentation))
        self.classification = LogVariance(math.log(1 / classification))

    def forward(self, examples: Tensor) -> Tensor:
        return torch.cat([self.segmentation(examples), self.classification(examples)], dim=1)
