"""The multi-scale classification head: image classes from the deeper encoder maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyclinic.mtl_model.blocks import NormLayer


class MultiScaleHead(nn.Module):
    """Norm, ReLU and mean of each chosen map, side by side, through two linear layers.

    A group norm's groups are made one here: the mean of a map that was normalised by itself says
    little, and how much of each channel there is tells classes apart.

    Args:
        channels: of all encoder maps, shallow to deep.
        stages: which of them are read, counted from 1.

    Shapes:
        maps: four encoder maps, (B, channels[k], ., .)
        out:  (B, classes)
    """

    def __init__(
        self,
        channels: Sequence[int],
        stages: Sequence[int],
        width: int,
        classes: int,
        norm: NormLayer,
    ) -> None:
        super().__init__()
        self.read = [stage - 1 for stage in stages]
        self.norms = nn.ModuleList(_across_channels(norm(channels[k])) for k in self.read)
        self.hidden = nn.Linear(sum(channels[k] for k in self.read), width)
        self.out = nn.Linear(width, classes)
        for linear in (self.hidden, self.out):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        means = [
            torch.relu(norm(maps[k])).mean(dim=(2, 3))
            for k, norm in zip(self.read, self.norms, strict=True)
        ]
        return self.out(self.hidden(torch.cat(means, dim=1)))


def _across_channels(norm: nn.Module) -> nn.Module:
    return nn.GroupNorm(1, norm.num_channels) if isinstance(norm, nn.GroupNorm) else norm
