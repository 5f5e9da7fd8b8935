"""Evaluate a model on one site's images."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from polyclinic.client.data.dataset import ExampleDataset, Examples, to_batch
from polyclinic.client.training.device import dtype_of
from polyclinic.configs.schema.data import DataConfig
from polyclinic.mtl_model.inference import InferenceForm
from polyclinic.mtl_model.measure import NonFiniteOutputError, batch_sums
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.sums import Classes, MetricSums, empty_sums


class EvaluationError(RuntimeError):
    """A model cannot be evaluated. The message says why."""


@torch.no_grad()  # not inference_mode: tensors that .to() creates here are trained later
def evaluate(
    model: MultiTaskUNet,
    examples: Examples,
    *,
    data: DataConfig,
    batch_size: int,
    precision: str,
    device: torch.device,
    hd95: bool = False,
) -> MetricSums:
    """Compute a model's metric sums over a site's examples, for the annotated tasks.

    Args:
        hd95: also compute Hausdorff distances, which is slow and requires MONAI.

    Raises:
        EvaluationError: if the model's output is not finite.
        DistanceError: if ``hd95`` is set and MONAI is not installed.
    """
    classes = Classes.of(data)
    ready = InferenceForm(model.to(device), dtype_of(precision, device))
    sums = empty_sums(classes)
    loader = DataLoader(ExampleDataset(examples), batch_size=batch_size)
    for batch in loader:
        images, targets = to_batch(batch, data.normalise, device)
        prediction = ready(images, examples.tasks)
        try:
            sums = sums + batch_sums(prediction, targets, classes, hd95)
        except NonFiniteOutputError:
            raise EvaluationError(
                "the model's output is not finite; try a smaller train.learning-rate or "
                "train.precision = 'fp32'"
            ) from None
    return sums
