"""What several tests stand on: tiny settings, a tiny federation in one process, the real images."""

from __future__ import annotations

import csv
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported

import numpy as np
import torch
from PIL import Image

from configs.run import RunConfig
from tests.memory_grid import MemoryGrid

REAL_IMAGES = Path(__file__).resolve().parents[2] / "shared" / "data" / "breast_us_mini"

TINY: dict[str, bool | int | float | str] = {
    "data.image-height": 32,
    "data.image-width": 32,
    "model.backbone": "resnet18",
    "model.width": 16,
    "model.depths": "1,1,1,1",
    "model.swin-depth": 1,
    "model.head-channels": 8,
    "model.dfe": "sum",
    "model.drop-path": 0.0,
    "phantom.size": 48,
    "phantom.examples": 12,
    "train.batch-size": 4,
    "rounds.count": 2,
    "rounds.deadline-s": 60.0,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from a second thread, and neighbours lose a core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phantoms that tests write go into pytest's folder, not into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., RunConfig]:
    """A config of the smallest useful run, with changes by keyword (``data__root="..."``)."""

    def make(**changes: bool | int | float | str) -> RunConfig:
        named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
        base = {"run.output-dir": str(tmp_path / "runs"), "run.name": "a-run"}
        return RunConfig.from_flat({**TINY, **base, **named})

    return make


@pytest.fixture
def flower_identity() -> Iterator[None]:
    """flwr refuses to build a Message outside of a task; pretend to be in one."""
    from flwr.supercore.task_identity import TaskIdentity

    before = {name: getattr(TaskIdentity, name) for name in ("_task_id", "_run_id", "_node_id")}
    for name in before:
        setattr(TaskIdentity, name, 1)
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


@pytest.fixture
def grid(flower_identity: None) -> Callable[[RunConfig], MemoryGrid]:
    """A federation of a config's simulated sites in this process."""
    from apps import client

    def make(config: RunConfig, sites: int = 3) -> MemoryGrid:
        return MemoryGrid(client, config.to_flat(), sites)

    return make


@pytest.fixture
def real_images() -> Path:
    if not REAL_IMAGES.is_dir():
        pytest.skip(f"the real images are not beside this checkout ({REAL_IMAGES})")
    return REAL_IMAGES


@pytest.fixture
def site_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a site folder of small random images; each row is a dict of manifest cells."""

    def make(rows: list[dict[str, str]], name: str = "site", size: tuple[int, int] = (40, 48)):
        folder = tmp_path / name
        rng = np.random.default_rng(0)
        for row in rows:
            for cell, values in (("image", 256), ("mask", 2)):
                if row.get(cell):
                    pixels = rng.integers(0, values, size, dtype=np.uint8) * (255 // (values - 1))
                    path = folder / row[cell]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
        write_manifest(folder, rows)
        return folder

    return make


def write_manifest(folder: Path, rows: list[dict[str, str]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def rows_of(count: int, label: str = "benign", prefix: str = "") -> list[dict[str, str]]:
    """Rows of fully annotated images."""
    return [
        {
            "image": f"images/{prefix}{label}{i}.png",
            "mask": f"masks/{prefix}{label}{i}.png",
            "label": label,
        }
        for i in range(count)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
