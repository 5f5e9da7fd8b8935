"""The benchmarks: equal outputs of equal networks, measurements and argument errors."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.server.aggregation.averaging import Contribution
from polyclinic.server.rounds.update_checks import HELD
from polyclinic.simulation.benchmarks import bench
from polyclinic.simulation.benchmarks.bench import BY_DEFAULT, CONTESTANTS, Bench, run_bench
from polyclinic.simulation.benchmarks.memory import Replies, one_round
from polyclinic.simulation.benchmarks.privacy import (
    PrivacyBench,
    PrivacyRow,
    run_privacy_bench,
    table,
)
from tests.conftest import pretended_task
from tests.factories import SMALL

TINY = Bench(size=64, batch=2, threads=1, turns=1)


@pytest.fixture
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make our benchmarked networks as small as possible."""
    build = bench.build_model

    def smaller(config: ModelConfig, **shape: object) -> torch.nn.Module:
        return build(config.model_copy(update=SMALL), **shape)

    monkeypatch.setattr(bench, "build_model", smaller)


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_every_benchmarked_network_predicts_and_trains(tiny_networks: None, name: str) -> None:
    masks, *classes = bench._inference(TINY, CONTESTANTS[name])()
    assert masks.shape == (2, 1, 64, 64)
    assert [c.shape for c in classes] == ([] if name.startswith("swin") else [(2, 3)])
    bench._training(TINY, CONTESTANTS[name])()


def test_benchmarked_forms_of_one_network_agree(tiny_networks: None) -> None:
    differences = bench._differences(TINY, ["plain", "ours", "ours-bf16", "light", "smp-unet"])
    assert set(differences) == {"ours", "ours-bf16"}
    assert differences["ours"] < 1e-4 < differences["ours-bf16"] < 0.05


def test_peak_memory_is_measured_in_a_separate_process(capsys: pytest.CaptureFixture[str]) -> None:
    run_bench(64, 1, 1, 1, "cpu", "light", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)["networks"]
    assert 100 < row["inference_mb"] < row["training_mb"]


def test_unknown_network_device_or_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--only: expected names among plain, .*got 'unet'"):
        run_bench(64, 1, 1, 1, "cpu", "unet", as_json=True)
    with pytest.raises(ConfigError, match=r"--device cuda:99: .*PyTorch sees"):
        run_bench(64, 1, 1, 1, "cuda:99", "light", as_json=True)
    with pytest.raises(ConfigError, match="--device gpu: "):
        run_bench(64, 1, 1, 1, "gpu", "light", as_json=True)
    with pytest.raises(ConfigError, match=r"--size: expected a multiple of 32.*, got 240"):
        run_bench(240, 1, 1, 1, "cpu", "light", as_json=True)


def test_failed_memory_process_leaves_a_gap_and_reason(
    tiny_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    run_bench(64, 1, 1, 1, "cpu", "light", as_json=True)
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["networks"]
    assert row["inference_mb"] is None
    assert row["training_ms"] > 0
    assert "peak memory of light, training was not measured: status 1" in err


@pytest.mark.long
def test_privacy_bench_times_private_and_plain_steps(capsys: pytest.CaptureFixture[str]) -> None:
    run_privacy_bench(64, "light", "2", 1, 1, "cpu", "fp32", "plain,ghost", as_json=True)
    rows = json.loads(capsys.readouterr().out)["ways"]
    assert [row["way"] for row in rows] == ["plain", "ghost"]
    assert all(row["step_ms"] > 0 and row["training_mb"] > 100 for row in rows)
    found = [PrivacyRow("plain", 2, 100.0, 1000.0), PrivacyRow("ghost", 2, 150.0, None)]
    cells = [
        list(column.cells)
        for column in table(PrivacyBench(64, "l", 1, 1, "cpu", "fp32"), found).columns
    ]
    assert cells[3] == ["1.00", "1.50"]
    assert cells[4:] == [["1000", "-"], ["1.00", "-"]]


def test_invalid_privacy_bench_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--only: expected some of plain, ghost.*, got 'ghosts'"):
        run_privacy_bench(64, "light", "2", 1, 1, "cpu", "fp32", "ghosts", as_json=True)
    with pytest.raises(ConfigError, match=r"--physical-batch-sizes: expected whole .* got '2,0'"):
        run_privacy_bench(64, "light", "2,0", 1, 1, "cpu", "fp32", None, as_json=True)


def test_bf16_without_hardware_is_measured_only_on_request(
    tiny_networks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def measured(_bench: Bench, names: tuple[str, ...], _words: object) -> list[bench.Row]:
        asked.append(names)
        return [bench.Row("plain", "", 1)]

    monkeypatch.setattr(bench, "measure", measured)
    for has in (True, False):
        monkeypatch.setattr(bench, "computes_bf16", lambda _device, has=has: has)
        run_bench(64, 1, 1, 1, "cpu", None, as_json=True)
        capsys.readouterr()
    run_bench(64, 1, 1, 1, "cpu", "plain,ours-bf16", as_json=True)
    assert "ours-bf16" in asked[0]
    assert "ours-bf16" not in asked[1]
    assert asked[2] == ("plain", "ours-bf16")


def test_replies_are_released_after_aggregation(tiny, tmp_path: Path, monkeypatch) -> None:
    alive = contributions_alive(tiny(run__name=""), monkeypatch)
    assert len(alive) == 20
    assert max(alive[HELD + 1 :]) <= 1  # the first few are held for comparison
    gathered = contributions_alive(tiny(run__name="", strategy__name="fedmedian"), monkeypatch)
    assert max(gathered) >= 19  # negative control: these strategies keep all replies


def contributions_alive(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the contributions in memory at each pulled reply in a round of 20 sites."""
    alive: list[int] = []
    reply = Replies._reply

    def counting(self: Replies, identity: str) -> Message:
        gc.collect()
        alive.append(sum(type(x) is Contribution for x in gc.get_objects()))
        return reply(self, identity)

    gc.collect()
    gc.freeze()  # existing objects are not scanned again each time
    with pretended_task(), monkeypatch.context() as patch:
        patch.setattr(Replies, "_reply", counting)
        one_round(config, 20)
    gc.unfreeze()
    return alive
