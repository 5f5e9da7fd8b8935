"""Hausdorff distance between the outlines of predicted and true masks.

The distance is computed by MONAI, an optional dependency that takes seconds to import. It is
therefore imported only when distances are requested.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


class DistanceError(ImportError):
    """Distances were requested, but MONAI is not installed."""


def check_distances() -> None:
    """Check that MONAI is installed, without importing it.

    Raises:
        DistanceError: if it is not. The message says what to install.
    """
    if importlib.util.find_spec("monai") is None:
        raise DistanceError(
            "evaluate.hd95: expected MONAI, which is not installed; "
            "pip install 'polyclinic[metrics]' or set evaluate.hd95 to false"
        )


def hausdorff_95(predicted: Tensor, actual: Tensor) -> Tensor:
    """Compute the 95th percentile of the Hausdorff distance between pairs of masks.

    The result is the larger of the percentiles of the two directions.

    Args:
        predicted: predicted masks, none of them empty.
        actual: true masks, none of them empty.

    Shapes:
        predicted: (n, H, W), bool
        actual:    (n, H, W), bool
        out:       (n,), float, pixels, 0 or more

    Raises:
        DistanceError: if MONAI is not installed.
    """
    if not len(predicted):
        return torch.zeros(0)
    check_distances()
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    # MONAI needs another package to compute distances on a GPU.
    guess, truth = predicted[:, None].float().cpu(), actual[:, None].float().cpu()
    distance: Tensor = compute_hausdorff_distance(
        guess, truth, include_background=True, percentile=95
    )
    return distance[:, 0]
