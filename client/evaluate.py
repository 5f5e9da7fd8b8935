"""One site's evaluation: a model and images in, sums out."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from client.dataset import ExampleDataset, Examples, to_batch
from client.device import autocast, memory_format
from configs.run import DataConfig
from mtl_model.metrics import MetricSums, batch_sums, empty_sums


class EvaluationError(RuntimeError):
    """A model cannot be evaluated. The message says why."""


@torch.no_grad()  # not inference_mode: what .to() makes here is trained in the next round
def evaluate(
    model: nn.Module,
    examples: Examples,
    *,
    data: DataConfig,
    batch_size: int,
    precision: str,
    device: torch.device,
) -> MetricSums:
    """Count how a model does on a site's examples, for the tasks that they are annotated for.

    Raises:
        EvaluationError: if the model's output is not finite.
    """
    classes = len(data.classes)
    model.to(device).to(memory_format=memory_format(device)).eval()
    sums = empty_sums(mask_classes=1, image_classes=classes)
    loader = DataLoader(ExampleDataset(examples), batch_size=batch_size)
    for pixels, masks, has_mask, labels in loader:
        images, targets = to_batch(pixels, masks, has_mask, labels, data.normalise, device)
        with autocast(device, precision):
            prediction = model(images, examples.tasks)
        if not all(logits is None or logits.isfinite().all() for logits in prediction):
            raise EvaluationError(
                "the model's output is not finite; try a smaller train.learning-rate or "
                "train.precision = 'fp32'"
            )
        sums = sums + batch_sums(prediction, targets, classes)
    return sums
