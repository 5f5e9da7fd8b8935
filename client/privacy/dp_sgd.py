"""DP-SGD: a local round whose weights tell little of any one image, or of any one patient.

Abadi et al., "Deep Learning with Differential Privacy", 2016. Every unit (an example, or a patient
with all of theirs) is in a step with the same probability, on its own; what it adds to the step's
gradient is clipped (``client.privacy.unit_gradients``); noise is added to the sum, which is divided
by the number of units expected, not by how many came.

Sampling and noise take their randomness from the operating system and never from the run's seed,
which the server knows: who knows the noise can take it off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import default_collate

from polyclinic.client.data.augment import Augmentation
from polyclinic.client.data.dataset import ExampleDataset, Examples, to_batch
from polyclinic.client.privacy.unit_gradients import units_of_network
from polyclinic.client.training.device import autocast
from polyclinic.client.training.local_round import (
    NO_PULL,
    Proximal,
    Round,
    TrainingError,
    TrainResult,
    adamw,
    class_weights_of,
    learning_rate,
)
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.losses import multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.tasks import Task, group_of

Positions = NDArray[np.int64]  # of examples, in their split


@dataclass(frozen=True)
class Adaptation:
    """How the clipping norm follows the units' (Andrew et al., 2021)."""

    quantile: float  # share of the units whose gradients are to lie below the norm
    rate: float  # of each step's change of the norm's logarithm


@dataclass(frozen=True)
class Mechanism:
    """What a local round does to the units, as far as privacy goes.

    Nothing of it depends on the images: it follows from the run's settings and from what the site
    declares of itself, so it may be told to anyone.
    """

    noise_multiplier: float  # standard deviation of the noise over the clipping norm
    sample_rate: float  # of each unit in each step
    steps: int  # of one round
    units: int  # declared
    clip_norm: float
    adapts: Adaptation | None = None  # how the clipping norm moves; None: it stays

    @property
    def expected_units(self) -> float:
        """Units of a step, on average."""
        return self.sample_rate * self.units


def sampling(train: TrainConfig, examples: int) -> tuple[float, int]:
    """The rate at which each unit is drawn, and the steps of a round.

    Args:
        examples: training examples that the site declares; a batch has ``train.batch-size`` of
            them on average.
    """
    rate = min(1.0, train.batch_size / examples)
    return rate, train.local_steps or train.local_epochs * -(-examples // train.batch_size)


def units_of(examples: Examples, unit: str) -> list[Positions]:
    """The places of each unit's examples: one each, or all of a patient's."""
    if unit == "example":
        return [np.array([place]) for place in range(len(examples))]
    _, patient = np.unique(examples.group, return_inverse=True)
    return [np.flatnonzero(patient == k) for k in range(patient.max() + 1)]


def train_one_round_privately(
    model: MultiTaskUNet,
    examples: Examples,
    where: Round,
    *,
    mechanism: Mechanism,
    data: DataConfig,
    train: TrainConfig,
    loss: LossConfig,
    privacy: PrivacyConfig,
    device: torch.device,
    proximal: Proximal = NO_PULL,
    random: np.random.Generator | None = None,
) -> TrainResult:
    """Train ``model`` in place on one site's examples, with differential privacy.

    As ``train_one_round``, but for what protects the units; losses, which nothing protects, are
    not told. Which tasks are trained is taken to be known: a site that annotates a task for none of
    its images leaves that task's parameters as they came.

    Args:
        proximal: pulls the weights to those that came.
        random: where sampling and noise come from; None: the operating system.

    Raises:
        TrainingError: if no example is annotated, or the weights are not finite.
    """
    tasks = examples.tasks
    if not tasks:
        raise TrainingError("none of the training examples has a mask or a label")
    started = time.perf_counter()
    random = random or np.random.Generator(np.random.Philox())
    units = units_of(examples, privacy.unit)
    augmentation = Augmentation(int(random.integers(2**31))) if train.augment else None
    dataset = ExampleDataset(examples, augmentation)
    class_weights = class_weights_of(examples, data, loss).to(device)
    torch.manual_seed(int(random.integers(2**31)))  # drop path
    model.to(device).to(memory_format=torch.channels_last).train()
    trained = _only_those_of(model, tasks)
    optimizer = adamw(model, train)
    add_proximal_gradient = proximal.gradient(model)
    gradient = NoisyGradient(trained, mechanism.expected_units, random)
    clipping = ClipNorm(mechanism, random)
    try:
        with units_of_network(privacy.gradients, model, trained) as network:
            for step in range(mechanism.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(train, where, step, mechanism.steps)
                chosen = np.flatnonzero(random.random(len(units)) < mechanism.sample_rate)
                norms = [torch.empty(0)]
                for microbatch in microbatches(
                    [units[k] for k in chosen], privacy.physical_batch_size
                ):
                    for chunk in microbatch:
                        batch = default_collate([dataset[int(place)] for place in chunk.positions])
                        images, targets = to_batch(batch, data.normalise, device)
                        with autocast(device, train.precision):
                            prediction = network.forward(images, tasks)
                        losses = multi_task_loss(prediction, targets, loss, class_weights)
                        unit = torch.from_numpy(chunk.unit).to(device)
                        network.backward(losses.total.sum(), unit, alone=len(microbatch) > 1)
                    norms.append(network.clip(clipping.norm, gradient.sums).cpu())
                gradient.release(clipping.deviation)
                clipping.move(torch.cat(norms))
                add_proximal_gradient()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        model.requires_grad_(True).zero_grad(set_to_none=True)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise TrainingError(
            f"round {where.number}: weights not finite; try a smaller train.learning-rate"
        )
    return TrainResult(mechanism.steps, time.perf_counter() - started, None, None)


def _only_those_of(model: MultiTaskUNet, tasks: tuple[Task, ...]) -> list[nn.Parameter]:
    """Take the other tasks' parameters out of training; return those that are in it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in ("encoder", *tasks))
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Chunk:
    """Examples that go through the network together."""

    positions: Positions
    unit: NDArray[np.int64]  # (len(places),) which of its pack's units each belongs to


def microbatches(units: Sequence[Positions], most: int) -> Iterator[list[Chunk]]:
    """Share a step's units out to passes of ``most`` examples at most.

    A pack is what is clipped at once, and no unit is in two: several whole units in one chunk, or
    one that is too large for a pass in several.
    """
    together: list[Positions] = []
    for unit in units:
        if len(unit) > most:
            yield [
                Chunk(unit[start : start + most], np.zeros(len(unit[start : start + most]), int))
                for start in range(0, len(unit), most)
            ]
            continue
        if sum(map(len, together)) + len(unit) > most:
            yield [_chunk(together)]
            together = []
        together.append(unit)
    if together:
        yield [_chunk(together)]


def _chunk(units: Sequence[Positions]) -> Chunk:
    return Chunk(np.concatenate(units), np.repeat(np.arange(len(units)), [len(u) for u in units]))


class ClipNorm:
    """The clipping norm of a step, and what it costs to let it move.

    With adaptation, each step also counts the units whose gradient lies below the norm, with noise
    of its own, and moves the norm so that the share of them comes to a quantile. A step then
    releases two numbers of each unit: its clipped gradient and a half more or less of the count.
    The gradient's noise is raised so that both together are a Gaussian mechanism with the noise
    multiplier that is accounted for: z_gradient^-2 + (2 sigma_count)^-2 = z^-2 (Andrew et al.,
    "Differentially Private Learning with Adaptive Clipping", 2021, theorem 1).
    """

    def __init__(self, mechanism: Mechanism, random: np.random.Generator) -> None:
        self.norm = mechanism.clip_norm
        self.noise_multiplier = mechanism.noise_multiplier  # of the gradient
        self.expected_units = mechanism.expected_units
        self.adapts = mechanism.adapts
        self.random = random
        # as wide as a twentieth of the units, which hardly moves the share; never so narrow that
        # the count alone would cost more than the step may
        self.count_deviation = max(self.expected_units / 20, mechanism.noise_multiplier)
        if self.adapts and mechanism.noise_multiplier:
            rest = mechanism.noise_multiplier**-2 - (2 * self.count_deviation) ** -2
            self.noise_multiplier = rest**-0.5

    @property
    def deviation(self) -> float:
        """Of the noise on each number of the gradient's sum."""
        return self.noise_multiplier * self.norm

    def move(self, norms: Tensor) -> None:
        """Go on to the next step's norm.

        Shapes:
            norms: (U,) of all units of the step, as ``Units.clip`` returns them
        """
        if self.adapts is None:
            return
        # 1/2 off each, so that one unit more changes the sum by no more than that
        below = float((norms <= self.norm).sum()) - 0.5 * len(norms)
        noisy = below + self.count_deviation * self.random.standard_normal()
        share = noisy / self.expected_units + 0.5
        self.norm *= math.exp(-self.adapts.rate * (share - self.adapts.quantile))


class NoisyGradient:
    """The gradient of a step: the sum of what units added, with noise.

    What Opacus's DPOptimizer does, but for units of several examples, for steps in which no unit
    was drawn, and for the noise: torch's generator on a CPU keeps 32 bits of its seed, few enough
    to try them all.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        expected_units: float,
        random: np.random.Generator,
    ) -> None:
        self.expected_units = expected_units
        self.random = random
        self.sums = {p: torch.zeros_like(p, dtype=torch.float32) for p in parameters}

    def release(self, deviation: float) -> None:
        """Give the parameters the noisy mean, over the units expected, as their gradient."""
        for parameter, total in self.sums.items():
            noise = self.random.standard_normal(tuple(total.shape), dtype=np.float32)
            noisy = total.add_(torch.from_numpy(noise).to(total.device), alpha=deviation)
            parameter.grad = (noisy / self.expected_units).to(parameter.dtype)
            total.zero_()
