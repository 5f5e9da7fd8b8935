"""How far a predicted outline lies from the true one.

MONAI measures it. It takes seconds to import and no other part of us wants it, so it is imported
only when distances are asked for.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


class DistanceError(ImportError):
    """Distances were asked for, but what measures them is not installed."""


def check_distances() -> None:
    """See that distances can be measured here, without importing anything yet.

    Raises:
        DistanceError: saying what to install.
    """
    if importlib.util.find_spec("monai") is None:
        raise DistanceError(
            "evaluate.hd95: expected MONAI, which is not installed here; "
            "pip install 'polyclinic[metrics]', or leave evaluate.hd95 false"
        )


def hausdorff_95(predicted: Tensor, actual: Tensor) -> Tensor:
    """95th percentile of the distances between two outlines, the larger of both directions.

    Args:
        predicted, actual: masks of which none is empty.

    Shapes:
        predicted, actual: (n, H, W), bool
        out:               (n,), pixels

    Raises:
        DistanceError: if MONAI is not installed.
    """
    if not len(predicted):
        return torch.zeros(0)
    check_distances()
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    # on the CPU, where it needs no further package, whatever the device
    guess, truth = predicted[:, None].float().cpu(), actual[:, None].float().cpu()
    distance: Tensor = compute_hausdorff_distance(
        guess, truth, include_background=True, percentile=95
    )
    return distance[:, 0]
