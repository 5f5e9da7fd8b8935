"""Files written before the sub-packages existed are read with the same result."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from polyclinic.configs.schema.federation import read_federation
from polyclinic.configs.security.credentials import read_certificate
from tests import ROOT

RECORDED = ROOT / "tests" / "fixtures" / "before_packages"
SAID = json.loads((RECORDED / "said.json").read_text(encoding="utf-8"))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "recorded"))


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.suffix not in (".db-shm", ".db-wal")]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file()
    }


def test_ledger_has_spent_the_same_epsilon(recorded: Path, cli: Callable) -> None:
    status, out, _ = cli("site", "ledger", recorded / "site" / "site.yaml", "--verify", "--json")
    found = json.loads(out)
    del found["ledger"], found["schema_version"]
    wanted = {key.replace("-", "_"): value for key, value in SAID["ledger"].items()}
    assert (status, found) == (0, wanted)
    assert found["spent"] > 0


def test_outgoing_log_verifies_and_shows_the_same_entries(recorded: Path, cli: Callable) -> None:
    status, out, _ = cli("site", "outgoing", recorded / "site" / "site.yaml", "--json")
    entries = [json.loads(line) for line in out.splitlines()]
    assert {entry.pop("schema_version") for entry in entries} == {1}
    content = json.dumps(entries, sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()
    assert (status, {"entries": len(entries), "sha256": digest}) == (0, SAID["outgoing"])


def test_approvals_are_listed(recorded: Path, cli: Callable) -> None:
    status, out, _ = cli("site", "approve", recorded / "site" / "site.yaml")
    assert (status, out.splitlines()) == (0, SAID["approved"])
    assert SAID["approved"]


def test_reading_changes_no_record(recorded: Path, cli: Callable) -> None:
    before = hashes(recorded / "site")
    for command in ("ledger", "outgoing", "approve"):
        assert cli("site", command, recorded / "site" / "site.yaml")[0] == 0
    assert hashes(recorded / "site") == before


def test_run_folder_shows_the_same_results(recorded: Path, cli: Callable) -> None:
    runs = recorded / "runs"
    status, out, _ = cli("runs", "show", "finished", "--runs", runs, "--json")
    assert status == 0
    found, recorded_ = json.loads(out), SAID["results"]
    assert found["history"] == recorded_["history"]
    for key in ("run", "started", "status", "rounds", "best_round", "reason"):
        assert found[key] == recorded_[key.replace("_", "-")]
    assert round(found["best_value"], 3) == recorded_["best-value"]
    status, out, _ = cli("runs", "--runs", runs)
    assert status == 0
    assert "finished" in out


@pytest.mark.parametrize("model", ["runs/finished", "model.safetensors"])
def test_models_predict_the_same(recorded: Path, cli: Callable, model: str) -> None:
    image = recorded / "image.png"
    status, _, err = cli("predict", recorded / model, image, "--out", recorded / "predicted")
    assert status == 0, err
    (found,) = json.loads((recorded / "predicted" / "predictions.json").read_text())["images"]
    (wanted,) = SAID["predictions"]["images"]
    assert found["probabilities"] == pytest.approx(wanted["probabilities"], rel=1e-4)
    assert found["area"] == wanted["area"]


def test_kits_are_read(recorded: Path) -> None:
    kit = recorded / "kits" / "server"
    assert [site.name for site in read_federation(kit / "federation.yaml").sites] == ["north"]
    names = [kit / "server.crt", kit / "sites" / "north.crt", kit / "ca.crt"]
    assert all(read_certificate(name) for name in names)
