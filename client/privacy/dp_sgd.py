"""Train a local round with DP-SGD.

Abadi et al., "Deep Learning with Differential Privacy", 2016. Each unit (an example, or all
examples of a patient) is sampled independently with the same probability in every step. Its
gradient is clipped (``client.privacy.unit_gradients``), and noise is added to the sum. The sum is
divided by the expected number of units, not by the sampled number.

Sampling and noise use randomness from the operating system, never the run's seed: the server knows
the seed, and anyone who can reproduce the noise can subtract it.
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

Positions = NDArray[np.int64]  # indices of examples in their split


@dataclass(frozen=True)
class Adaptation:
    """Settings of adaptive clipping (Andrew et al., 2021)."""

    quantile: float  # target share of units with a gradient norm below the clipping norm, 0 to 1
    rate: float  # learning rate of the logarithm of the clipping norm


@dataclass(frozen=True)
class Mechanism:
    """The privacy parameters of one local round.

    They depend on the run's settings and on the numbers that the site declares, never on its
    images, so they may be public.
    """

    noise_multiplier: float  # standard deviation of the noise, divided by the clipping norm
    sample_rate: float  # sampling probability per unit and step, in (0, 1]
    steps: int  # steps per round
    units: int  # declared number of examples or patients
    clip_norm: float  # largest L2 norm of one unit's gradient; the initial one if adaptive
    adapts: Adaptation | None = None  # None: the clipping norm is fixed

    @property
    def expected_units(self) -> float:
        """Expected number of units per step."""
        return self.sample_rate * self.units


def sampling(train: TrainConfig, examples: int) -> tuple[float, int]:
    """Compute the sampling probability per unit and the number of steps per round.

    Args:
        train: training settings; a batch contains ``train.batch-size`` examples on average.
        examples: number of training examples that the site declares.
    """
    rate = min(1.0, train.batch_size / examples)
    return rate, train.local_steps or train.local_epochs * -(-examples // train.batch_size)


def units_of(examples: Examples, unit: str) -> list[Positions]:
    """List the positions of each unit's examples: one per example, or all of a patient's."""
    if unit == "example":
        return [np.array([place]) for place in range(len(examples))]
    _, patient = np.unique(examples.group, return_inverse=True)
    return [np.flatnonzero(patient == k) for k in range(patient.max() + 1)]


def train_one_round_privately(  # noqa: PLR0913 settings of one call, each used by name
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

    Same as ``train_one_round``, except that gradients are clipped and noisy, and that no losses are
    returned, since nothing protects them. The set of trained tasks is considered public: a task
    without any annotation at the site keeps the received parameters.

    Args:
        proximal: FedProx term that pulls the weights towards the received ones.
        random: source of sampling and noise; None: seeded by the operating system.

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
    torch.manual_seed(int(random.integers(2**31)))  # used by drop path
    model.to(device).to(memory_format=torch.channels_last).train()
    trained = _freeze_other_tasks(model, tasks)
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
                        network.backward(
                            losses.total.sum(), unit, unit_continues=len(microbatch) > 1
                        )
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


def _freeze_other_tasks(model: MultiTaskUNet, tasks: tuple[Task, ...]) -> list[nn.Parameter]:
    """Freeze the parameters of all other tasks and return the trainable ones."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) in ("encoder", *tasks))
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Chunk:
    """Examples of one forward and backward pass."""

    positions: Positions  # (B,)
    unit: NDArray[np.int64]  # (B,) index of each example's unit within the microbatch


def microbatches(units: Sequence[Positions], most: int) -> Iterator[list[Chunk]]:
    """Divide a step's units into microbatches of chunks of at most ``most`` examples.

    A microbatch is clipped at once, and no unit is in two of them. It holds either several whole
    units in one chunk, or one unit that is too large for one pass in several chunks.
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
    """The clipping norm, fixed or adaptive.

    Adaptive clipping counts the units with a gradient norm below the clipping norm in each step,
    adds noise to the count, and moves the clipping norm so that their share approaches a quantile.
    Each step then releases two quantities per unit: its clipped gradient and +1/2 or -1/2 in the
    count. The gradient's noise is increased so that both together are a Gaussian mechanism with the
    accounted noise multiplier z: z_gradient^-2 + (2 sigma_count)^-2 = z^-2 (Andrew et al.,
    "Differentially Private Learning with Adaptive Clipping", 2021, theorem 1).
    """

    def __init__(self, mechanism: Mechanism, random: np.random.Generator) -> None:
        self.norm = mechanism.clip_norm
        self.noise_multiplier = mechanism.noise_multiplier  # for the gradient
        self.expected_units = mechanism.expected_units
        self.adapts = mechanism.adapts
        self.random = random
        # A twentieth of the units hardly changes the share. The minimum keeps the cost of the
        # count below that of the whole step.
        self.count_deviation = max(self.expected_units / 20, mechanism.noise_multiplier)
        if self.adapts and mechanism.noise_multiplier:
            rest = mechanism.noise_multiplier**-2 - (2 * self.count_deviation) ** -2
            self.noise_multiplier = rest**-0.5

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each element of the gradient sum."""
        return self.noise_multiplier * self.norm

    def move(self, norms: Tensor) -> None:
        """Update the clipping norm for the next step.

        Shapes:
            norms: (U,) gradient norms of all units of the step, as ``Units.clip`` returns them
        """
        if self.adapts is None:
            return
        # subtracting 1/2 per unit limits the effect of one more unit on the sum to 1/2
        below = float((norms <= self.norm).sum()) - 0.5 * len(norms)
        noisy = below + self.count_deviation * self.random.standard_normal()
        share = noisy / self.expected_units + 0.5
        self.norm *= math.exp(-self.adapts.rate * (share - self.adapts.quantile))


class NoisyGradient:
    """The noisy sum of the units' clipped gradients in one step.

    Opacus's DPOptimizer does the same, but supports neither units of several examples nor steps
    without sampled units. Its noise comes from torch's generator, which on a CPU keeps only 32 bits
    of its seed: few enough to try all of them.
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
        """Set each parameter's gradient to the noisy sum divided by the expected units.

        Args:
            deviation: standard deviation of the noise on each element of the sum.
        """
        for parameter, total in self.sums.items():
            noise = self.random.standard_normal(tuple(total.shape), dtype=np.float32)
            noisy = total.add_(torch.from_numpy(noise).to(total.device), alpha=deviation)
            parameter.grad = (noisy / self.expected_units).to(parameter.dtype)
            total.zero_()
