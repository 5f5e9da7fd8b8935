"""How much each task's loss counts, learned with the network.

Paper: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018. A
task's loss counts exp(-s), where s is the logarithm of its variance, and s / 2 is added, so that
no task can be silenced for nothing. What differs: here a site without a task's annotations leaves
that task's s alone, and the server averages each s over the sites that trained it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogVariance(nn.Module):
    """One task's s.

    A module of its own that is called with the examples, and answers once for each, so that the
    gradient of s can be told apart by example. Opacus hears of that gradient only while the
    examples want none themselves, as images do not.

    Shapes:
        in:  (B, ...), only B is read
        out: (B, 1), a view: the same number for every example
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([start]))

    def forward(self, examples: Tensor) -> Tensor:
        return self.value.expand(examples.shape[0], 1)


class Uncertainty(nn.Module):
    """Both tasks' s.

    Args:
        segmentation, classification: weights that the tasks' losses start with.

    Shapes:
        in:  (B, ...)
        out: (B, 2), segmentation first
    """

    def __init__(self, segmentation: float, classification: float) -> None:
        super().__init__()
        self.segmentation = LogVariance(math.log(1 / segmentation))
        self.classification = LogVariance(math.log(1 / classification))

    def forward(self, examples: Tensor) -> Tensor:
        return torch.cat([self.segmentation(examples), self.classification(examples)], dim=1)
