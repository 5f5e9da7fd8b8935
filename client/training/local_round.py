"""One site's local round: plain PyTorch over plain arguments."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyclinic.client.data.augment import Augmentation
from polyclinic.client.data.dataset import ExampleDataset, Examples, to_batch
from polyclinic.client.training.device import autocast, compiled
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.losses import Targets, balanced_class_weights, multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.uncertainty import LogVariance


class TrainingError(RuntimeError):
    """A local round cannot go on. The message says at which step and why."""


@dataclass(frozen=True)
class Round:
    """Where a local round stands in its run; from it follow its learning rates and its seeds."""

    number: int  # from 1
    rounds: int
    seed: int
    site: str

    def seeds(self) -> Iterator[int]:
        """Endless seeds that no other round, site or run seed shares."""
        source = np.random.default_rng(
            [self.seed, self.number, zlib.crc32(self.site.encode("utf-8"))]
        )
        while True:
            yield int(source.integers(2**31))


@dataclass(frozen=True)
class Proximal:
    """FedProx's pull of the weights to those that came: mu / 2 times the squared distance, in the
    loss (Li et al., "Federated Optimization in Heterogeneous Networks", 2020).

    It depends on no image: with privacy it is added to the noisy gradient, and costs nothing.
    """

    mu: float
    apart: frozenset[str] = frozenset()  # parameters that are the site's own, which nothing pulls

    def gradient(self, model: nn.Module) -> Callable[[], None]:
        """What adds its gradient to that of a step; ``model`` now holds the weights that came."""
        if self.mu == 0:
            return lambda: None
        pairs = [
            (parameter, parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if name not in self.apart
        ]

        @torch.no_grad()
        def add() -> None:
            for parameter, came in pairs:
                if parameter.grad is not None:  # a task that is not trained stays where it is
                    parameter.grad.add_(parameter - came, alpha=self.mu)

        return add


NO_PULL = Proximal(0.0)


@dataclass(frozen=True)
class TrainResult:
    """What a local round did; the losses are means over the examples that carry the annotation."""

    steps: int
    seconds: float
    loss_segmentation: float | None
    loss_classification: float | None


def train_one_round(
    model: MultiTaskUNet,
    examples: Examples,
    where: Round,
    *,
    data: DataConfig,
    train: TrainConfig,
    loss: LossConfig,
    device: torch.device,
    proximal: Proximal = NO_PULL,
) -> TrainResult:
    """Train ``model`` in place on one site's examples.

    Tasks that no example is annotated for are not computed, and their parameters stay as they
    came. AdamW starts anew each round; its learning rate goes on along the whole run's schedule.

    Args:
        proximal: pulls the weights to those that came.

    Raises:
        TrainingError: if there is nothing to learn from, or a loss is not finite.
    """
    tasks = examples.tasks
    if not tasks:
        raise TrainingError(f"none of {len(examples)} training examples has a mask or a label")
    started = time.perf_counter()
    seeds = where.seeds()
    torch.manual_seed(next(seeds))  # drop path
    steps = train.steps(len(examples))
    class_weights = class_weights_of(examples, data, loss).to(device)
    model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = adamw(model, train)
    add_proximal_gradient = proximal.gradient(model)
    model.set_grad_checkpointing(train.grad_checkpointing)
    forward = compiled(model) if train.compile else model
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    batches = _batches(examples, steps, seeds, data, train, device)
    for step, (images, targets) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, where, step, steps)
        with autocast(device, train.precision):
            prediction = forward(images, tasks)
        losses = multi_task_loss(prediction, targets, loss, class_weights)
        losses.total.mean().backward()
        add_proximal_gradient()
        if train.clip_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # here, or gradients would lie beside activations
        totals += torch.stack(
            [
                losses.segmentation.detach().sum(),
                targets.has_mask.any(1).sum(),
                losses.classification.detach().sum(),
                targets.has_label.sum(),
            ]
        )
    segmentation, masked, classification, labelled = totals.tolist()
    if not np.isfinite([segmentation, classification]).all():
        raise TrainingError(
            f"round {where.number}: loss not finite (segmentation {segmentation}, classification "
            f"{classification}); try a smaller train.learning-rate or train.precision = 'fp32'"
        )
    return TrainResult(
        steps=steps,
        seconds=time.perf_counter() - started,
        loss_segmentation=segmentation / masked if masked else None,
        loss_classification=classification / labelled if labelled else None,
    )


def learning_rate(train: TrainConfig, where: Round, step: int, steps: int) -> float:
    """Polynomial decay over the whole run, of which this round has ``steps`` steps."""
    done = (where.number - 1) * steps + step
    return train.learning_rate * (1 - done / (where.rounds * steps)) ** train.poly_power


def adamw(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW of what is in training; tasks' log variances do not decay: 0 is no better a value."""
    learned = [module.value for module in model.modules() if isinstance(module, LogVariance)]
    apart = set(map(id, learned))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": learned, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=train.learning_rate, weight_decay=train.weight_decay, fused=True
    )


def class_weights_of(examples: Examples, data: DataConfig, loss: LossConfig) -> Tensor:
    """(K,) weights of the classification loss, from config or from these examples' labels."""
    if loss.class_weights == "none":
        return torch.ones(len(data.classes))
    if loss.class_weights == "balanced":
        return balanced_class_weights(torch.from_numpy(examples.class_counts()))
    return torch.tensor([float(weight) for weight in loss.class_weights.split(",")])


def _batches(
    examples: Examples,
    steps: int,
    seeds: Iterator[int],
    data: DataConfig,
    train: TrainConfig,
    device: torch.device,
) -> Iterator[tuple[Tensor, Targets]]:
    """Shuffled epochs one after the other until ``steps`` batches are out."""
    while True:
        augmentation = Augmentation(next(seeds)) if train.augment else None
        loader = DataLoader(
            ExampleDataset(examples, augmentation),
            batch_size=train.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(next(seeds)),
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            yield to_batch(batch, data.normalise, device)
            steps -= 1
            if steps == 0:
                return
