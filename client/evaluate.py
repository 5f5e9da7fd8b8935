"""One site's evaluation: a model and images in, sums out."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader

from client.dataset import ExampleDataset, Examples, to_batch
from client.device import autocast, memory_format
from configs.run import DataConfig
from mtl_model.metrics import MetricSums, batch_sums, empty_sums


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    examples: Examples,
    *,
    data: DataConfig,
    batch_size: int,
    precision: str,
    device: torch.device,
) -> MetricSums:
    """Count how a model does on a site's examples, for the tasks that they are annotated for."""
    classes = len(data.classes)
    model.to(device, memory_format=memory_format(device)).eval()
    sums = empty_sums(mask_classes=1, image_classes=classes)
    for batch in DataLoader(ExampleDataset(examples), batch_size=batch_size):
        images, targets = to_batch(*batch, data.normalise, device)
        with autocast(device, precision):
            prediction = model(images, examples.tasks)
        sums = sums + batch_sums(prediction, targets, classes)
    return sums
