"""The two tasks and the parameters that belong to each."""

from __future__ import annotations

from typing import Literal

Task = Literal["segmentation", "classification"]
Group = Literal["encoder", "segmentation", "classification"]

TASKS: tuple[Task, ...] = ("segmentation", "classification")
GROUPS: tuple[Group, ...] = ("encoder", *TASKS)

_GROUP_OF_PART: dict[str, Group] = {
    "encoder": "encoder",
    "dfe": "segmentation",
    "decoder": "segmentation",
    "head": "classification",
    "uncertainty.segmentation": "segmentation",
    "uncertainty.classification": "classification",
}


def group_of(name: str) -> Group:
    """Return the group of a state-dict entry of MultiTaskUNet: the shared encoder or a task.

    Raises:
        ValueError: if the name belongs to no part of the network.
    """
    for part, group in _GROUP_OF_PART.items():
        if name.startswith(f"{part}."):
            return group
    raise ValueError(f"{name}: expected a name under {', '.join(_GROUP_OF_PART)}")
