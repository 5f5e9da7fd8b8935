"""The images, built and run: what is in them, and what a process in them may do."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from configs import VERSION
from tests.containers.podman import PODMAN, ROOT, build, podman_run_arguments, why_no_containers

pytestmark = [
    pytest.mark.containers,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first test builds 7 GB
]

USER = 12345  # not the image's own: a site's state belongs to a user of the site
TARGETS = ("coordinator", "site")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The name of the image of each target."""
    why = why_no_containers()
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("build")
    return {target: build(target, VERSION, folder / target) for target in TARGETS}


@pytest.fixture(scope="module")
def kits(
    images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, str]]]:
    """For each image a compose file in a folder of its own, and what its .env says."""
    found = {}
    for target in images:
        place = tmp_path_factory.mktemp(target)
        for name in ("kit", "data", "state"):
            (place / name).mkdir()
        os.chown(place / "state", USER, USER)
        compose = place / "kit" / "compose.yml"
        compose.write_bytes((ROOT / "docker" / f"compose.{target}.yml").read_bytes())
        variables = {
            "POLYCLINIC_VERSION": VERSION,
            "POLYCLINIC_UID": str(USER),
            "POLYCLINIC_GID": str(USER),
            "POLYCLINIC_PORT": "8000",
            "POLYCLINIC_DATA": str(place / "data"),
            "POLYCLINIC_STATE": str(place / "state"),
        }
        found[target] = (compose, variables)
    return found


def run(
    kit: tuple[Path, dict[str, str]],
    program: str,
    *arguments: str,
    stdin: str = "",
    root: bool = False,
) -> str:
    """What a program says in a container of an image."""
    compose, variables = kit
    if root:
        variables = variables | {"POLYCLINIC_UID": "0", "POLYCLINIC_GID": "0"}
    options = ("--rm", "--interactive", f"--entrypoint={program}")
    command = [*podman_run_arguments(compose, variables, *options), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=TARGETS)
def inside(
    request: pytest.FixtureRequest, kits: dict[str, tuple[Path, dict[str, str]]]
) -> dict[str, Any]:
    """What it is like in a container that runs as its compose file says."""
    probe = (ROOT / "tests" / "containers" / "probe.py").read_text(encoding="utf-8")
    return json.loads(run(kits[request.param], "python", "-", stdin=probe))


def test_nobody_is_root_and_no_privilege_can_be_had(inside: dict[str, Any]) -> None:
    assert (inside["uid"], inside["gid"]) == (USER, USER)
    assert set(inside["capabilities"]) == {"0" * 16}
    assert inside["no new privileges"] == "1"


def test_only_the_state_and_memory_can_be_written(inside: dict[str, Any]) -> None:
    assert inside["writable"] == ["/tmp", "/dev/shm", "/var/lib/polyclinic"]
    assert inside["tmp"][2] == "tmpfs"
    assert {"noexec", "nosuid", "nodev"} < set(inside["tmp"][3].split(","))
    assert inside["shm bytes"] >= 256 << 20


def test_everything_imports_compiled_and_from_one_place(inside: dict[str, Any]) -> None:
    ours, packages = inside["imported"][:2], inside["imported"][2:]
    assert all(path.startswith("/opt/polyclinic/") for path in ours)
    assert all(path.startswith("/opt/venv/") for path in packages)
    assert inside["compiled"] > 50


def test_nothing_of_the_build_is_left(inside: dict[str, Any]) -> None:
    assert inside["builders"] == []
    assert inside["test packages"] == []
    assert inside["leftovers"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_build_left_no_cache_in_the_home_of_root(
    target: str, kits: dict[str, tuple[Path, dict[str, str]]]
) -> None:
    assert set(run(kits[target], "ls", "-A", "/root", root=True).split()) <= {".bashrc", ".profile"}


def test_nothing_asks_the_internet(inside: dict[str, Any]) -> None:
    environment = inside["environment"]
    for name in (
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
        "FLWR_DISABLE_UPDATE_CHECK",
        "NO_ALBUMENTATIONS_UPDATE",
    ):
        assert environment[name] == "1", name
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"] == "/var/lib/polyclinic/flwr"


def test_the_bill_of_materials_lists_what_constraints_pin(inside: dict[str, Any]) -> None:
    listed = {each["name"].lower(): each["version"] for each in inside["sbom"]["components"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines)
    assert inside["sbom"]["bomFormat"] == "CycloneDX"
    assert inside["sbom"]["metadata"]["component"]["name"] == "polyclinic"
    assert {"torch", "torchvision", "flwr", "grpcio", "timm"} <= set(listed)
    common = set(pinned) & set(listed)
    assert len(common) > 80
    assert {name: listed[name] for name in common} == {name: pinned[name] for name in common}


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_line_answers(
    target: str, kits: dict[str, tuple[Path, dict[str, str]]]
) -> None:
    assert run(kits[target], "polyclinic", "--version").strip() == VERSION


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_says_what_it_is_and_starts_as_nobody(target: str, images: dict[str, str]) -> None:
    told = subprocess.run(
        [*PODMAN, "image", "inspect", images[target]], capture_output=True, text=True, check=True
    )
    (image,) = json.loads(told.stdout)
    assert image["Config"]["User"] == "10001:10001"
    assert image["Labels"]["org.opencontainers.image.version"] == VERSION
    started = {"coordinator": ["server", "start"], "site": ["site", "start"]}
    assert image["Config"]["Entrypoint"] == ["polyclinic"]
    assert image["Config"]["Cmd"][:2] == started[target]


def test_the_coordinator_packs_the_release_that_is_in_it(
    kits: dict[str, tuple[Path, dict[str, str]]],
) -> None:
    compose, variables = kits["coordinator"]
    script = "cd /var/lib/polyclinic && flwr build --app /opt/polyclinic"
    run((compose, variables), "sh", "-c", script)
    (release,) = Path(variables["POLYCLINIC_STATE"]).glob("*.fab")
    assert VERSION.replace(".", "-") in release.name
