"""The Flower App Bundle: small, complete and without unneeded files."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from polyclinic.client.policy.releases import release_of_folder
from polyclinic.configs import VERSION
from polyclinic.configs.security.release import open_release
from tests import ROOT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fab")
    program = Path(sys.executable).parent / "flwr"
    subprocess.run(
        [str(program), "build", "--app", str(ROOT)],
        cwd=folder,
        check=True,
        capture_output=True,
        env={"FLWR_HOME": str(folder / "home"), "FLWR_DISABLE_UPDATE_CHECK": "1"},
    )
    (path,) = folder.glob("*.fab")
    return path


def test_bundle_contains_exactly_modules_and_presets(bundle: Path) -> None:
    names = {name for name in zipfile.ZipFile(bundle).namelist() if not name.startswith(".info")}
    rooms = ("client", "configs", "mtl_model", "server", "simulation")
    wanted = {"apps.py", "polyclinic.py", "pyproject.toml", "LICENSE"}
    wanted |= {str(p.relative_to(ROOT)) for room in rooms for p in (ROOT / room).glob("**/*.py")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.toml")}
    assert names == wanted  # excludes tests/faults, which has an apps.py too
    assert bundle.stat().st_size < 1_500_000  # Flower stores without compressing


def test_bundle_digest_matches_source_packed_and_unpacked(bundle: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(bundle).extractall(tmp_path)
    packed = open_release(bundle.read_bytes()).digest
    assert packed == release_of_folder(tmp_path) == release_of_folder(ROOT)


def test_bundle_opens_as_a_release(bundle: Path) -> None:
    release = open_release(bundle.read_bytes())
    assert release.version == VERSION
    assert {"apps.py", "client/policy/site_policy.py", "pyproject.toml"} <= set(release.files)


def test_bundle_imports_without_the_checkout(bundle: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(bundle).extractall(tmp_path)
    code = (
        f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]; "
        f"sys.path.insert(0, {str(tmp_path)!r}); import apps; print(apps.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "apps.py")
