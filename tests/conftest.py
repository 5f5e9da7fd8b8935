"""Shared fixtures: tiny settings, a tiny federation in one process, and the real images."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from polyclinic.configs.run import RunConfig
from tests import ROOT
from tests.memory_grid import MemoryGrid

REAL_IMAGES = ROOT.parent / "shared" / "data" / "breast_us_mini"

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
    "rounds.deadline-s": 240.0,  # enough for real processes on a busy machine
}


# Tests that share expensive fixtures or start processes with deadlines: one process per group.
GROUPS = ("faults", "containers", "real processes", "exported")  # slowest first


# Modules that train networks, attack them or integrate densities: seconds per test.
NUMERIC = {
    "client/policy/test_site_policy.py",
    "client/privacy/test_accounting.py",
    "client/privacy/test_dp_sgd.py",
    "client/privacy/test_grad_samplers.py",
    "client/privacy/test_open_findings.py",
    "client/privacy/test_unit_gradients.py",
    "client/test_killed_site.py",
    "client/test_private_site.py",
    "client/training/test_local_round.py",
    "end_to_end/test_bundle.py",
    "end_to_end/test_commands.py",
    "mtl_model/test_attention.py",
    "mtl_model/test_backbone.py",
    "mtl_model/test_fast_paths.py",
    "mtl_model/test_metrics.py",
    "mtl_model/test_network.py",
    "mtl_model/test_pretrained.py",
    "server/aggregation/test_central_dp.py",
    "server/export/test_export.py",
    "simulation/attacks/test_audit.py",
    "simulation/attacks/test_inversion.py",
    "simulation/benchmarks/test_bench.py",
    "simulation/experiments/test_tradeoff.py",
}
# Fixtures that train a whole federation in this process, seconds each.
FEDERATED = {"grid", "finished_run", "exported"}


@pytest.hookimpl(tryfirst=True)  # before xdist, which sends a group's tests to one process
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist, run each group in one process, and the groups before all other tests."""
    place = {}
    for item in items:
        if FEDERATED & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.federation)
        if item.path.relative_to(ROOT / "tests").as_posix() in NUMERIC:
            item.add_marker(pytest.mark.numeric)
        group = _group_of(item)
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
        place[item] = GROUPS.index(group) if group else len(GROUPS)
    items.sort(key=place.__getitem__)


def _group_of(item: pytest.Item) -> str | None:
    if "exported" in getattr(item, "fixturenames", ()):
        return "exported"
    if item.path.stem in ("test_faults", "test_containers"):
        return item.path.stem.removeprefix("test_")
    return "real processes" if item.get_closest_marker("slow") else None


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Limit torch to one thread: tiny tensors gain nothing from a second one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the phantoms that tests write into pytest's folder instead of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., RunConfig]:
    """Build the config of the smallest useful run; changes by keyword (``data__root="..."``)."""

    def make(**changes: bool | int | float | str) -> RunConfig:
        named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
        base = {"run.output-dir": str(tmp_path / "runs"), "run.name": "a-run"}
        return RunConfig.from_flat({**TINY, **base, **named})

    return make


@contextlib.contextmanager
def pretended_task() -> Iterator[None]:
    """Pretend to be in a task, since flwr builds a Message only within one."""
    from flwr.supercore.task_identity import TaskIdentity

    before = {name: getattr(TaskIdentity, name) for name in ("_task_id", "_run_id", "_node_id")}
    for name in before:
        setattr(TaskIdentity, name, 1)
    yield
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


@pytest.fixture
def flower_identity() -> Iterator[None]:
    with pretended_task():
        yield


@pytest.fixture
def grid(
    flower_identity: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RunConfig], MemoryGrid]:
    """Build a federation of a config's simulated sites in this process."""
    from apps import client

    def make(config: RunConfig, sites: int = 3) -> MemoryGrid:
        return MemoryGrid(client, config.to_flat(), sites)

    # all sites are connected from the start
    monkeypatch.setattr("polyclinic.server.rounds.federation.SETTLE_S", 0.0)
    return make


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Call the command line in this process: arguments in; exit status, stdout, stderr out."""
    import polyclinic

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyclinic", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            polyclinic.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of two rounds and return its folder; its data are in ``../../phantoms``."""
    from apps import client
    from polyclinic.server.app import run
    from polyclinic.simulation.phantom.writer import write_phantoms

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("finished")
    write_phantoms(place / "phantoms", sites=2, examples=14, seed=0, size=48, normal_fraction=0.0)
    named = {"run.output-dir": str(place / "runs"), "run.name": "a-run"}
    # exporters need a second for every few layers, and dilated enhancement has the most layers
    named |= {"data.root": str(place / "phantoms"), "model.dfe": "none"}
    config = RunConfig.from_flat({**TINY, **named})
    with pretended_task():
        return run(MemoryGrid(client, config.to_flat(), 2), config).path


class Exports(dict[str, Path]):
    """A run's model by format, exported by the command line on first access."""

    SUFFIXES: ClassVar = {"safetensors": ".safetensors", "torchscript": ".pt", "onnx": ".onnx"}

    def __init__(self, run: Path, place: Path) -> None:
        super().__init__()
        self.run = run
        self.place = place

    def __missing__(self, kind: str) -> Path:
        import polyclinic

        torch.set_num_threads(1)
        self[kind] = self.place / f"model{self.SUFFIXES[kind]}"
        arguments = ["export", str(self.run), "--format", kind, "--out", str(self[kind])]
        done = CliRunner().invoke(polyclinic.command_line(), arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return self[kind]


@pytest.fixture(scope="session")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Export that run's model in every format, on first access; ONNX takes most of a minute."""
    return Exports(finished_run, tmp_path_factory.mktemp("exported"))


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
    """Return manifest rows of fully annotated images."""
    return [
        {
            "image": f"images/{prefix}{label}{i}.png",
            "mask": f"masks/{prefix}{label}{i}.png",
            "label": label,
        }
        for i in range(count)
    ]
