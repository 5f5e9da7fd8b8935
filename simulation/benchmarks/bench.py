"""Speed and memory of the network, compared with a reference implementation and other networks.

All networks are measured in one run, in alternating turns, and the median of the turns is reported.
Peak memory is measured in a separate process per network. ``polyclinic bench model`` prints the
results; docs/model.md shows an example.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from polyclinic.client.training.device import (
    DeviceError,
    autocast,
    compiled,
    computes_bf16,
    dtype_of,
    find_device,
)
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import messages, print_json, print_table
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.mtl_model.inference import InferenceForm
from polyclinic.mtl_model.network import MultiTaskUNet, build_model
from polyclinic.simulation.benchmarks.plain import reference_implementation
from polyclinic.simulation.benchmarks.timing import interleaved, memory_of, print_peak_memory

CHANNELS, MASKS, CLASSES = 3, 1, 3
BASE = "plain"  # the network that ratios refer to
STRIDE = 32  # largest stride of all networks


@dataclass(frozen=True)
class Contestant:
    """A network to measure and the way it is run."""

    says: str  # description in the table
    make: Callable[[int], nn.Module]  # builds the network for an image side in pixels
    precision: str = "fp32"
    plain: bool = False  # True to use the default memory layout and no inference form
    recompute: bool = False  # True to use activation checkpointing
    compile: bool = False  # True to use torch.compile


@dataclass(frozen=True)
class Bench:
    """The conditions of a measurement."""

    size: int = 224  # side of the images in pixels
    batch: int = 2  # images per batch
    threads: int = 2  # CPU threads
    turns: int = 7  # number of timed turns
    device: str = "cpu"


@dataclass
class Row:
    """Measurements of one network: milliseconds per image and peak memory of the process in MB."""

    name: str
    says: str
    parameters: int
    inference_ms: float | None = None
    training_ms: float | None = None
    inference_mb: float | None = None
    training_mb: float | None = None
    differs: float | None = None  # largest difference of a logit from the base's, relative


def ours(**changes: object) -> Callable[[int], MultiTaskUNet]:
    """Return a builder of the project's network with default settings except ``changes``."""

    def make(size: int) -> MultiTaskUNet:
        return build_model(
            ModelConfig.model_validate(changes),
            size=(size, size),
            in_channels=CHANNELS,
            image_classes=CLASSES,
            mask_channels=MASKS,
            seed=0,
        )

    return make


PUBLISHED = {"norm": "batch", "drop_path": 0.0}


def _smp(_size: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    network: nn.Module = smp.Unet(
        "resnet34",
        encoder_weights=None,
        in_channels=CHANNELS,
        classes=MASKS,
        aux_params={"classes": CLASSES},
    )
    return network


def _swin_unetr(features: int) -> Callable[[int], nn.Module]:
    def make(_size: int) -> nn.Module:
        from monai.networks.nets.swin_unetr import SwinUNETR

        network: nn.Module = SwinUNETR(
            in_channels=CHANNELS, out_channels=MASKS, feature_size=features, spatial_dims=2
        )
        return network

    return make


CONTESTANTS: Mapping[str, Contestant] = {
    BASE: Contestant(
        "published shape, reference implementation",
        lambda size: reference_implementation(ours(**PUBLISHED)(size)),
        plain=True,
    ),
    "ours": Contestant("published shape", ours(**PUBLISHED)),
    "ours-recompute": Contestant(
        "published shape, train.grad-checkpointing", ours(**PUBLISHED), recompute=True
    ),
    "ours-compile": Contestant("published shape, train.compile", ours(**PUBLISHED), compile=True),
    "ours-bf16": Contestant("published shape, bf16", ours(**PUBLISHED), precision="bf16"),
    "ours-group": Contestant("default settings (group norm)", ours(drop_path=0.0)),
    "light": Contestant("model.preset light", ours(preset="light")),
    "light-bf16": Contestant("model.preset light, bf16", ours(preset="light"), precision="bf16"),
    "smp-unet": Contestant("segmentation_models_pytorch Unet(resnet34) + head", _smp),
    "swin-unetr-48": Contestant("MONAI SwinUNETR 2-D, 48 features", _swin_unetr(48)),
    "swin-unetr-24": Contestant("MONAI SwinUNETR 2-D, 24 features", _swin_unetr(24)),
}
BY_DEFAULT = tuple(name for name in CONTESTANTS if name != "ours-compile")


def run_bench(
    size: int,
    batch: int,
    threads: int,
    turns: int,
    device: str,
    only: str | None,
    as_json: bool,
) -> None:
    """Measure networks and print results to standard output, messages to standard error.

    Args:
        size: side of the images in pixels, a multiple of 32.
        batch: images per batch.
        threads: CPU threads.
        turns: number of timed turns.
        device: the device, as in ``train.device``.
        only: names of networks, separated by commas; None for the default selection.
        as_json: True to print the results as JSON, False to print a table.

    Raises:
        ConfigError: if a network is unknown, its package is not installed, or the device is not
            available.
    """
    names = tuple(only.split(",")) if only else BY_DEFAULT
    words = messages()
    for name in names:
        if name not in CONTESTANTS:
            raise ConfigError(
                f"--only: expected names among {', '.join(CONTESTANTS)}, got {name!r}"
            )
    if size % STRIDE:
        raise ConfigError(
            f"--size: expected a multiple of {STRIDE}, as some networks require, got {size}"
        )
    try:
        bench = Bench(size, batch, threads, turns, str(find_device(device)))
    except (DeviceError, RuntimeError) as error:  # torch raises RuntimeError for unknown names
        raise ConfigError(f"--device {device}: {error}") from None
    if not only and not computes_bf16(torch.device(bench.device)):
        names = tuple(n for n in names if CONTESTANTS[n].precision != "bf16")
        words.print("skipping bf16, which this processor only emulates; select it with --only")
    try:
        rows = measure(bench, names, words)
    except ImportError as error:
        raise ConfigError(
            f"{error}: pip install 'polyclinic[bench]' or select other networks with --only"
        ) from None
    if as_json:
        content = {"on": asdict(bench), "networks": [asdict(row) for row in rows]}
        print_json(content)
        return
    print_table(table(bench, rows))


def measure(bench: Bench, names: Sequence[str], words: Console) -> list[Row]:
    """Time the networks in alternating turns, then measure the peak memory of each."""
    torch.set_num_threads(bench.threads)
    rows = {
        name: Row(
            name,
            CONTESTANTS[name].says,
            sum(p.numel() for p in CONTESTANTS[name].make(bench.size).parameters()),
        )
        for name in names
    }
    for phase in ("inference", "training"):
        steps = {name: _step(bench, CONTESTANTS[name], phase) for name in names}
        times = interleaved(steps, bench.turns, phase, words)
        del steps  # frees the networks and their optimisers
        for name, row in rows.items():
            setattr(row, f"{phase}_ms", statistics.median(times[name]) / bench.batch * 1e3)
    if BASE in names:
        for name, difference in _differences(bench, names).items():
            rows[name].differs = difference
    for name, row in track(rows.items(), "peak memory", console=words, transient=True):
        on = json.dumps(asdict(bench))
        row.inference_mb = memory_of(
            "polyclinic.simulation.benchmarks.bench", (name, "inference", on), words
        )
        row.training_mb = memory_of(
            "polyclinic.simulation.benchmarks.bench", (name, "training", on), words
        )
    return list(rows.values())


def _step(bench: Bench, contestant: Contestant, phase: str) -> Callable[[], object]:
    return _inference(bench, contestant) if phase == "inference" else _training(bench, contestant)


def _prepared(bench: Bench, contestant: Contestant) -> tuple[nn.Module, Tensor]:
    network = contestant.make(bench.size).to(bench.device)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(bench.batch, CHANNELS, bench.size, bench.size, generator=random)
    images = images.to(bench.device)
    if not contestant.plain:
        network = network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return network, images


def _inference(bench: Bench, contestant: Contestant) -> Callable[[], list[Tensor]]:
    network, images = _prepared(bench, contestant)
    device = torch.device(bench.device)
    network.eval()
    if isinstance(network, MultiTaskUNet) and not contestant.plain:
        network = InferenceForm(network, dtype_of(contestant.precision, device))
    forward = compiled(network) if contestant.compile else network

    def step() -> list[Tensor]:
        with torch.no_grad():
            logits = _logits(forward(images))
        _wait(bench)
        return logits

    return step


def _training(bench: Bench, contestant: Contestant) -> Callable[[], None]:
    network, images = _prepared(bench, contestant)
    network.train()
    if contestant.recompute and isinstance(network, MultiTaskUNet):
        network.set_grad_checkpointing(True)
    forward = compiled(network) if contestant.compile else network
    masks = (torch.rand(bench.batch, MASKS, bench.size, bench.size) > 0.5).float()
    masks, labels = masks.to(bench.device), torch.arange(bench.batch, device=bench.device) % CLASSES
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        with autocast(torch.device(bench.device), contestant.precision):
            mask_logits, *class_logits = _logits(forward(images))
        loss = F.binary_cross_entropy_with_logits(mask_logits.float(), masks)
        for logits in class_logits:  # SwinUNETR has no classifier
            loss = loss + F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(bench)

    return step


def _logits(output: Tensor | Sequence[Tensor | None]) -> list[Tensor]:
    """Return mask logits and, if the network has a classifier, class logits."""
    several = [output] if isinstance(output, Tensor) else output
    return [logits for logits in several if logits is not None]


def _wait(bench: Bench) -> None:
    if bench.device.startswith("cuda"):
        torch.cuda.synchronize(bench.device)


def _differences(bench: Bench, names: Sequence[str]) -> dict[str, float]:
    """Compute the relative difference of each form of the published shape from the base."""
    expected = _inference(bench, CONTESTANTS[BASE])()
    same = [n for n in names if n.startswith("ours") and n != "ours-group"]
    return {
        name: max(
            ((found - wanted).abs().max() / wanted.abs().max()).item()
            for found, wanted in zip(_inference(bench, CONTESTANTS[name])(), expected, strict=True)
        )
        for name in same
    }


def _main(name: str, phase: str, bench: Bench) -> None:
    """Take three steps in this process and print its peak memory."""
    torch.set_num_threads(bench.threads)
    step = _step(bench, CONTESTANTS[name], phase)
    for _ in range(3):
        step()
    print_peak_memory(bench.device)


def table(bench: Bench, rows: Sequence[Row]) -> Table:
    """Format the measurements as a table, with speed and memory relative to the base."""
    base = next((row for row in rows if row.name == BASE), rows[0])
    laid = Table(
        title=(
            f"{bench.size} x {bench.size} pixels, batch {bench.batch}, {bench.device}, "
            f"{bench.threads} threads, medians of {bench.turns} turns"
        ),
        title_justify="left",
        caption=(
            f"ms: milliseconds per image; x: speed relative to {base.name}; MB: peak memory of the "
            "process, including imports and optimiser; of base: training memory relative to "
            f"{base.name}; differs: largest difference of a logit from {base.name}, relative to "
            "the largest logit"
        ),
        caption_justify="left",
    )
    laid.add_column("network")
    columns = ("M param.", "infer ms", "x", "train ms", "x", "infer MB", "train MB", "of base")
    for name in (*columns, "differs"):
        laid.add_column(name, justify="right")
    for row in rows:
        laid.add_row(
            row.says,
            f"{row.parameters / 1e6:.1f}",
            *_cells(row.inference_ms, base.inference_ms),
            *_cells(row.training_ms, base.training_ms),
            "-" if row.inference_mb is None else f"{row.inference_mb:.0f}",
            "-" if row.training_mb is None else f"{row.training_mb:.0f}",
            _share(row.training_mb, base.training_mb),
            "" if row.differs is None else f"{row.differs:.0e}",
        )
    return laid


def _cells(value: float | None, base: float | None) -> tuple[str, str]:
    if value is None or base is None:
        return "-", "-"
    return f"{value:.0f}", f"{base / value:.2f}"


def _share(value: float | None, base: float | None) -> str:
    return "-" if value is None or base is None else f"{value / base:.2f}"


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], Bench(**json.loads(sys.argv[3])))
