"""One site's evaluation: a model and images in, sums out."""

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


@torch.no_grad()  # not inference_mode: what .to() makes here is trained in the next round
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
    """Count how a model does on a site's examples, for the tasks that they are annotated for.

    Args:
        hd95: measure distances between outlines too, which takes MONAI and time.

    Raises:
        EvaluationError: if the model's output is not finite.
        DistanceError: if distances are asked for and MONAI is not installed.
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
