"""The package from a checkout and from a wheel, next to other packages with our folders' names.

In tests/end_to_end/test_simulate.py and in every deployment under tests/, the working folder holds
such packages too: `simulate`, `flwr run`, `server start` and `site start` work in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from polyclinic.client.policy.releases import release_of_folder
from tests import ROOT
from tests.conftest import TINY
from tests.faults.deployment import plant_foreign_packages

PROGRAM = Path(sys.executable).parent / "polyclinic"


def test_foreign_packages_in_the_working_folder_are_not_imported(tmp_path: Path) -> None:
    elsewhere = plant_foreign_packages(tmp_path)
    done = subprocess.run(
        [PROGRAM, "settings"], cwd=elsewhere, capture_output=True, text=True, check=True
    )
    assert "[data]" in done.stdout


def test_planted_packages_raise_when_they_are_imported(tmp_path: Path) -> None:
    """Negative control of all tests in such a folder."""
    elsewhere = plant_foreign_packages(tmp_path)
    for name in ("client", "configs", "mtl_model", "server", "simulation"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}.app"],
            cwd=elsewhere,
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"the foreign package {name} was imported" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_wheel_in_a_clean_environment_trains_provisions_and_predicts(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    elsewhere = plant_foreign_packages(tmp_path / "elsewhere")
    programs = tmp_path / "clean" / "bin"

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    venv.create(tmp_path / "clean", with_pip=True, symlinks=True)
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check")
    call(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").iterdir()
    constraints = ROOT / "constraints.txt"
    call(*pip, "install", "--no-compile", "-c", constraints, wheel)

    # a wheel contains only its own package at top level
    listing = "from importlib.metadata import files; print(*files('polyclinic'), sep='\\n')"
    tops = {name.split("/")[0] for name in call(programs / "python", "-c", listing).split()}
    assert {top for top in tops if ".." not in top and ".dist-info" not in top} == {"polyclinic"}
    place = call(programs / "python", "-c", "import polyclinic; print(polyclinic.__path__[0])")
    assert Path(place.strip()).is_relative_to(tmp_path / "clean")
    assert release_of_folder(Path(place.strip())) == release_of_folder(ROOT)

    polyclinic = programs / "polyclinic"
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "runs"
    said = call(polyclinic, "simulate", *settings, "--rounds", "1", "--out", out, "--json")
    run = Path(json.loads(said)["run"])
    assert (run / "best.safetensors").is_file()

    federation = {
        "name": "tests",
        "server": {"address": "127.0.0.1", "port": 9000},
        "sites": [{"name": "north"}],
    }
    (elsewhere / "federation.yaml").write_text(yaml.safe_dump(federation))
    call(polyclinic, "server", "provision", "federation.yaml", "--out", "kits")
    assert (elsewhere / "kits" / "sites" / "north" / "site.yaml").is_file()

    call(programs / "flwr", "build", "--app", place.strip())
    (fab,) = elsewhere.glob("*.fab")
    assert call(polyclinic, "site", "release", fab).strip() == release_of_folder(ROOT)

    # `flwr run`, and `server start` with `site start`, by the wheel's programs
    tests = [
        "tests/end_to_end/test_simulate.py::test_flwr_run_streams_a_local_run",
        "tests/deployment/test_deployment.py::"
        "test_run_completes_despite_unauthorised_access_attempts",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=ROOT,
        env={**os.environ, "POLYCLINIC_TEST_PROGRAMS": str(programs)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout

    call(polyclinic, "phantom", "--out", "data", "--sites", "1", "--examples", "10", "--size", "48")
    images = elsewhere / "data" / "site-1" / "images"
    call(polyclinic, "predict", run, images, "--out", "predicted")
    assert list((elsewhere / "predicted").rglob("*.png"))
