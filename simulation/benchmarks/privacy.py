"""What differential privacy costs: a private step beside a plain one, in time and in memory.

Both train the same network on the same images; the private one also tells units apart, clips and
adds noise. `polyclinic bench privacy` prints it; docs/privacy.md shows a run.
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
    "functorch": "Opacus's functorch",
}
PLAIN = "plain"
CLASSES = 2


@dataclass(frozen=True)
class PrivacyBench:
    """What is measured on."""

    size: int
    preset: str
    threads: int
    turns: int
    device: str
    precision: str


@dataclass
class PrivacyRow:
    """One way at one number of images a pass."""

    way: str
    images: int
    step_ms: float
    training_mb: float | None = None


def run_privacy_bench(
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
    """Measure and print, results to standard output and words to standard error.

    Raises:
        ConfigError: for words that are no way, no number or no device.
    """
    ways = tuple(only.split(",")) if only else tuple(WAYS)
    for way in ways:
        if way not in WAYS:
            raise ConfigError(f"--only: expected some of {', '.join(WAYS)}, got {way!r}")
    images = batches.split(",")
    if not all(number.isdigit() and int(number) for number in images):
        raise ConfigError(f"--images: expected numbers from 1 and commas, got {batches!r}")
    try:
        bench = PrivacyBench(size, preset, threads, turns, str(find_device(device)), precision)
    except (DeviceError, RuntimeError) as error:  # torch's own for words that are no device
        raise ConfigError(f"--device {device}: {error}") from None
    words = Console(stderr=True, markup=False, highlight=False)
    rows = measure(bench, ways, [int(number) for number in images], words)
    if as_json:
        content = {"on": asdict(bench), "ways": [asdict(row) for row in rows]}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
        return
    width = None if sys.stdout.isatty() else 110
    Console(width=width, markup=False, highlight=False).print(table(bench, rows))


def measure(
    bench: PrivacyBench, ways: Sequence[str], batches: Sequence[int], words: Console
) -> list[PrivacyRow]:
    """Time all ways in turns at each number of images, then find each one's peak memory."""
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
    """A whole step of a fresh network: forward, backward, noise, optimiser."""
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
    """Lay out figures, each with its ratio to the plain step's of as many images."""
    laid = Table(
        title=(
            f"{bench.preset}, {bench.size} x {bench.size} pixels, {bench.precision}, "
            f"{bench.device}, {bench.threads} threads, medians of {bench.turns} turns"
        ),
        title_justify="left",
        caption="ms a step; MB: peak of the process, imports and optimiser included",
        caption_justify="left",
    )
    laid.add_column("images a pass", justify="right")
    laid.add_column("way")
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
