"""Which of the network's parts stay at a site, where a run has personal layers."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyclinic.mtl_model.tasks import group_of

Personal = Literal["none", "norms", "heads"]

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


def personal_names(network: nn.Module, kind: Personal) -> frozenset[str]:
    """Name the state-dict entries that a site keeps for itself.

    ``norms``: scales, shifts and running statistics of all normalisation layers (FedBN; Li et al.,
    2021). ``heads``: everything behind the shared encoder (FedPer; Arivazhagan et al., 2019), with
    the tasks' learned loss weights.
    """
    if kind == "heads":
        return frozenset(name for name in network.state_dict() if group_of(name) != "encoder")
    if kind == "norms":
        return frozenset(
            f"{path}.{name}"
            for path, module in network.named_modules()
            if isinstance(module, _NORMS)
            for name in module.state_dict()
        )
    return frozenset()
