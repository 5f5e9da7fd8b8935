"""Train one local round at a site, in plain PyTorch without Flower."""

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
    """A local round failed. The message gives the round and the reason."""


@dataclass(frozen=True)
class Round:
    """The position of a local round in its run, which determines learning rates and seeds."""

    number: int  # round, from 1
    rounds: int  # total number of rounds
    seed: int  # the run's seed
    site: str

    def seeds(self) -> Iterator[int]:
        """Generate an endless sequence of seeds from run seed, round and site."""
        source = np.random.default_rng(
            [self.seed, self.number, zlib.crc32(self.site.encode("utf-8"))]
        )
        while True:
            yield int(source.integers(2**31))


@dataclass(frozen=True)
class Proximal:
    """The proximal term of FedProx: mu / 2 times the squared distance to the received weights.

    Li et al., "Federated Optimization in Heterogeneous Networks", 2020. The term does not depend on
    images: with differential privacy it is added to the noisy gradient and costs no privacy.
    """

    mu: float  # weight of the term; 0: none
    apart: frozenset[str] = frozenset()  # names of personal parameters, which are exempt

    def gradient(self, model: nn.Module) -> Callable[[], None]:
        """Return a function that adds the term's gradient to the parameters' gradients.

        Args:
            model: the network, which currently holds the received weights.
        """
        if self.mu == 0:
            return lambda: None
        pairs = [
            (parameter, parameter.detach().clone())
            for name, parameter in model.named_parameters()
            if name not in self.apart
        ]

        @torch.no_grad()
        def add() -> None:
            for parameter, received in pairs:
                if parameter.grad is not None:  # None if the task is not trained
                    parameter.grad.add_(parameter - received, alpha=self.mu)

        return add


NO_PULL = Proximal(0.0)


@dataclass(frozen=True)
class TrainResult:
    """Steps, duration and losses of a local round; losses are means over annotated examples."""

    steps: int
    seconds: float
    loss_segmentation: float | None  # None: no annotated examples, or privacy
    loss_classification: float | None


def train_one_round(  # noqa: PLR0913 settings of one call, each used by name
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

    Tasks without annotated examples are not computed, and their parameters do not change. AdamW's
    state is reset every round; the learning rate follows the schedule of the whole run.

    Args:
        proximal: FedProx term that pulls the weights towards the received ones.

    Raises:
        TrainingError: if no example is annotated, or a loss is not finite.
    """
    tasks = examples.tasks
    if not tasks:
        raise TrainingError(f"none of {len(examples)} training examples has a mask or a label")
    started = time.perf_counter()
    seeds = where.seeds()
    torch.manual_seed(next(seeds))  # used by drop path
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
        # free the gradients here, so that they use no memory during the next forward pass
        optimizer.zero_grad(set_to_none=True)
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
    """Compute the learning rate of a step: polynomial decay over the whole run.

    Args:
        step: step within the round, from 0.
        steps: steps per round.
    """
    done = (where.number - 1) * steps + step
    return train.learning_rate * (1 - done / (where.rounds * steps)) ** train.poly_power


def adamw(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Build AdamW for the trainable parameters, without weight decay of the log variances.

    A log variance of 0 is no better than any other value.
    """
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
    """Compute the class weights of the classification loss, (K,), from config or label counts."""
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
    """Yield ``steps`` batches from consecutive shuffled epochs."""
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
