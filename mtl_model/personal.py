"""Personal layers: the parts of the network that stay at a site."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from polyclinic.mtl_model.tasks import group_of

Personal = Literal["none", "norms", "heads"]

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


def personal_names(network: nn.Module, kind: Personal) -> frozenset[str]:
    """List the state-dict entries that a site does not share.

    Args:
        network: the network of the run.
        kind: ``none`` for no entries; ``norms`` for scales, shifts and running statistics of all
            normalisation layers (FedBN; Li et al., 2021); ``heads`` for everything after the shared
            encoder, including the tasks' learned loss weights (FedPer; Arivazhagan et al., 2019).
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
