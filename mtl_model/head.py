"""The multi-scale classification head: class logits from the deeper encoder maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyclinic.mtl_model.blocks import NormLayer


class MultiScaleHead(nn.Module):
    """Normalise and average the chosen maps, concatenate them and apply two linear layers.

    Group norms have a single group here. The mean of a channel that is normalised with few others
    carries little information, while the channels' relative strengths help to distinguish classes.

    Args:
        channels: channels of all encoder maps, shallow to deep.
        stages: the maps to use, counted from 1.
        width: width of the hidden layer.
        classes: number of image classes.
        norm: factory of the normalisation layers.

    Shapes:
        maps: four encoder maps, (B, channels[k], H_k, W_k)
        out:  (B, classes), logits of any sign
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
