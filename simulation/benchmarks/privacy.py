"""Cost of differential privacy: time and memory of a training step with and without DP-SGD.

Both steps train the same network on the same images; the private step also computes per-unit
gradients, clips them and adds noise. ``polyclinic bench privacy`` prints the results;
docs/benchmarks/privacy.md shows an example.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from polyclinic.client.privacy.dp_sgd import NoisyGradient
from polyclinic.client.privacy.unit_gradients import Way, units_of_network
from polyclinic.client.training.device import DeviceError, autocast, find_device
from polyclinic.client.training.local_round import adamw
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import messages, print_json, print_table
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.losses import Targets, multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet, build_model
from polyclinic.simulation.benchmarks.timing import interleaved, memory_of, print_peak_memory

WAYS = {
    "plain": "without privacy",
    "ghost": "privacy.gradients ghost",
    "hooks": "privacy.gradients hooks (Opacus)",
    "functorch": "Opacus with functorch",
}
PLAIN = "plain"
CLASSES = 2


@dataclass(frozen=True)
class PrivacyBench:
    """The conditions of a measurement."""

    size: int  # side of the images in pixels
    preset: str  # value of model.preset
    threads: int  # CPU threads
    turns: int  # number of timed turns
    device: str
    precision: str  # value of train.precision


@dataclass
class PrivacyRow:
    """The measurement of one kind of step at one batch size."""

    way: str  # key of WAYS
    images: int  # images per batch
    step_ms: float  # milliseconds per step
    training_mb: float | None = None  # peak memory of the process in MB; None if it failed


def run_privacy_bench(  # noqa: PLR0913 settings of one call, each used by name
    size: int,
    preset: str,
    batches: str,
    threads: int,
    turns: int,
    device: str,
    precision: str,
    only: str | None,
    as_json: bool,
) -> None:
    """Measure training steps and print results to standard output, messages to standard error.

    Args:
        size: side of the images in pixels.
        preset: the value of ``model.preset``.
        batches: numbers of images per batch, separated by commas.
        threads: CPU threads.
        turns: number of timed turns.
        device: the device, as in ``train.device``.
        precision: the value of ``train.precision``.
        only: kinds of steps, separated by commas; None for all.
        as_json: True to print the results as JSON, False to print a table.

    Raises:
        ConfigError: if a kind of step, a number or the device is invalid.
    """
    ways = tuple(only.split(",")) if only else tuple(WAYS)
    for way in ways:
        if way not in WAYS:
            raise ConfigError(f"--only: expected some of {', '.join(WAYS)}, got {way!r}")
    images = batches.split(",")
    if not all(number.isdigit() and int(number) for number in images):
        raise ConfigError(
            "--physical-batch-sizes: expected whole numbers of 1 or more separated by commas, got "
            f"{batches!r}"
        )
    try:
        bench = PrivacyBench(size, preset, threads, turns, str(find_device(device)), precision)
    except (DeviceError, RuntimeError) as error:  # torch raises RuntimeError for unknown names
        raise ConfigError(f"--device {device}: {error}") from None
    words = messages()
    rows = measure(bench, ways, [int(number) for number in images], words)
    if as_json:
        content = {"on": asdict(bench), "ways": [asdict(row) for row in rows]}
        print_json(content)
        return
    print_table(table(bench, rows))


def measure(
    bench: PrivacyBench, ways: Sequence[str], batches: Sequence[int], words: Console
) -> list[PrivacyRow]:
    """Time the steps in alternating turns at each batch size, then measure their peak memory."""
    torch.set_num_threads(bench.threads)
    rows: list[PrivacyRow] = []
    for images in batches:
        steps = {way: _step(bench, way, images) for way in ways}
        times = interleaved(steps, bench.turns, f"{images} images", words)
        rows += [PrivacyRow(way, images, statistics.median(t) * 1e3) for way, t in times.items()]
        del steps
    for row in rows:
        arguments = (row.way, str(row.images), json.dumps(asdict(bench)))
        row.training_mb = memory_of("polyclinic.simulation.benchmarks.privacy", arguments, words)
    return rows


def _step(bench: PrivacyBench, way: str, images: int) -> Callable[[], None]:
    """Make a function that takes a complete training step of a new network."""
    network = build_model(
        ModelConfig.model_validate({"preset": bench.preset, "drop_path": 0.0}),
        size=(bench.size, bench.size),
        in_channels=1,
        image_classes=CLASSES,
        seed=0,
    )
    network = network.to(bench.device).to(memory_format=torch.channels_last).train()
    random = torch.Generator().manual_seed(0)
    shape = (images, 1, bench.size, bench.size)
    batch = torch.randn(shape, generator=random).to(bench.device)
    known = torch.ones(images, dtype=torch.bool, device=bench.device)
    masks = (torch.rand(shape, generator=random) > 0.7).float().to(bench.device)
    labels = torch.eye(CLASSES, device=bench.device)[torch.arange(images) % CLASSES]
    targets = Targets(masks, known[:, None], labels, known)
    optimizer = adamw(network, TrainConfig())
    step = _plain_step if way == PLAIN else _private_step

    def whole() -> None:
        step(bench, way, network, batch, targets)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if bench.device.startswith("cuda"):
            torch.cuda.synchronize(bench.device)

    return whole


def _plain_step(
    bench: PrivacyBench, _way: str, network: MultiTaskUNet, images: torch.Tensor, targets: Targets
) -> None:
    with autocast(torch.device(bench.device), bench.precision):
        prediction = network(images)
    multi_task_loss(prediction, targets, LossConfig()).total.mean().backward()


def _private_step(
    bench: PrivacyBench, way: str, network: MultiTaskUNet, images: torch.Tensor, targets: Targets
) -> None:
    trained = list(network.parameters())
    gradient = NoisyGradient(trained, len(images), np.random.Generator(np.random.Philox()))
    with units_of_network(cast(Way, way), network, trained) as units:
        with autocast(torch.device(bench.device), bench.precision):
            prediction = units.forward(images)
        losses = multi_task_loss(prediction, targets, LossConfig())
        units.backward(losses.total.sum(), torch.arange(len(images), device=images.device))
        units.clip(1.0, gradient.sums)
    gradient.release(deviation=1.0)


def table(bench: PrivacyBench, rows: Sequence[PrivacyRow]) -> Table:
    """Format the measurements as a table, relative to the plain step of the same batch size."""
    laid = Table(
        title=(
            f"{bench.preset}, {bench.size} x {bench.size} pixels, {bench.precision}, "
            f"{bench.device}, {bench.threads} threads, medians of {bench.turns} turns"
        ),
        title_justify="left",
        caption=(
            "ms: milliseconds per step; MB: peak memory of the process, including imports and "
            "optimiser"
        ),
        caption_justify="left",
    )
    laid.add_column("batch size", justify="right")
    laid.add_column("step")
    for name in ("step ms", "x plain", "MB", "x plain"):
        laid.add_column(name, justify="right")
    plain = {row.images: row for row in rows if row.way == PLAIN}
    for i, row in enumerate(rows):
        base = plain.get(row.images)
        laid.add_row(
            str(row.images),
            WAYS[row.way],
            f"{row.step_ms:.0f}",
            "-" if base is None else f"{row.step_ms / base.step_ms:.2f}",
            "-" if row.training_mb is None else f"{row.training_mb:.0f}",
            "-"
            if base is None or not row.training_mb or not base.training_mb
            else f"{row.training_mb / base.training_mb:.2f}",
            end_section=i + 1 < len(rows) and rows[i + 1].images != row.images,
        )
    return laid


def _main(way: str, images: str, bench: PrivacyBench) -> None:
    torch.set_num_threads(bench.threads)
    step = _step(bench, way, int(images))
    for _ in range(3):
        step()
    print_peak_memory(bench.device)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], PrivacyBench(**json.loads(sys.argv[3])))
