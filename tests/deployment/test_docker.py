"""The files in docker/: hardening options, mounts, and the build context.

tests/deployment/test_containers.py builds the images and runs them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT
from tests.containers.podman import filled_in, podman_run_arguments

DOCKER = ROOT / "docker"
VARIABLES = {
    "POLYCLINIC_VERSION": "1.2.3",
    "POLYCLINIC_PORT": "8443",
    "POLYCLINIC_DATA": "/images",
}
FILES = {name: DOCKER / f"compose.{name}.yml" for name in ("coordinator", "site")}
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def service(name: str, **variables: str) -> dict[str, Any]:
    text = filled_in(FILES[name].read_text(encoding="utf-8"), {**VARIABLES, **variables})
    services = yaml.safe_load(text)["services"]
    assert list(services) == [name]
    return services[name]


def mounts(name: str, **variables: str) -> dict[str, tuple[str, str]]:
    """Return source and mode of each mount by its target."""
    found = {}
    for each in service(name, **variables)["volumes"]:
        source, target, *how = each.split(":")
        found[target] = (source, *(how or ["rw"]))
    return found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("user", "10001:10001"),
        ("read_only", True),
        ("cap_drop", ["ALL"]),
        ("security_opt", ["no-new-privileges:true"]),
        ("tmpfs", ["/tmp:size=1g,mode=1777,noexec,nosuid,nodev"]),
        ("pids_limit", 4096),
        ("init", True),
        ("restart", "unless-stopped"),
    ],
)
def test_compose_service_sets_hardening_option(name: str, key: str, value: object) -> None:
    assert service(name)[key] == value


@pytest.mark.parametrize("name", FILES)
def test_compose_service_grants_no_extra_privilege(name: str) -> None:
    taken = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"}
    assert not taken & set(service(name))


@pytest.mark.parametrize("name", FILES)
def test_compose_user_is_configurable(name: str) -> None:
    assert service(name, POLYCLINIC_UID="7", POLYCLINIC_GID="8")["user"] == "7:8"


@pytest.mark.parametrize("name", FILES)
def test_compose_bounds_logs_and_sets_shared_memory_size(name: str) -> None:
    logging = service(name)["logging"]
    assert logging["driver"] == "json-file"
    assert set(logging["options"]) == {"max-size", "max-file"}
    assert re.fullmatch(r"\d+[mg]", service(name)["shm_size"])


@pytest.mark.parametrize("name", FILES)
def test_compose_defines_a_health_check(name: str) -> None:
    check = service(name)["healthcheck"]
    assert check["test"][:2] == ["CMD", "polyclinic"]
    assert "health" in check["test"]
    assert {"interval", "timeout", "start_period"} < set(check)


def test_only_the_coordinator_publishes_one_port() -> None:
    assert service("coordinator")["ports"] == ["8443:8443"]
    assert "ports" not in service("site")


@pytest.mark.parametrize("name", FILES)
def test_compose_mounts_kit_read_only_and_state_writable(name: str) -> None:
    found = mounts(name)
    assert found.pop("/etc/polyclinic") == (".", "ro")
    assert found.pop("/var/lib/polyclinic") == ("state", "rw")
    assert found == ({"/data": ("/images", "ro")} if name == "site" else {})
    assert mounts(name, POLYCLINIC_STATE="/there")["/var/lib/polyclinic"] == ("/there", "rw")


@pytest.mark.parametrize("name", FILES)
def test_missing_compose_variable_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="POLYCLINIC_VERSION"):
        filled_in(FILES[name].read_text(encoding="utf-8"), {})


@pytest.mark.parametrize("name", FILES)
def test_podman_arguments_follow_the_compose_file(name: str) -> None:
    said = podman_run_arguments(FILES[name], VARIABLES, "--rm", network="bridge")
    assert said[-1] == f"localhost/polyclinic-{name}:1.2.3"
    assert {
        "--rm",
        "--user=10001:10001",
        "--read-only=true",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--volume={DOCKER}:/etc/polyclinic:ro",
    } < set(said)
    assert ("--publish=8443:8443" in said) == (name == "coordinator")


def test_unknown_compose_key_is_refused(tmp_path: Path) -> None:
    compose = tmp_path / "compose.yml"
    compose.write_text("services: {site: {image: site, privileged: true}}")
    with pytest.raises(ValueError, match="privileged"):
        podman_run_arguments(compose, {})


@pytest.mark.parametrize(
    "files", [["coordinator"], ["site"], ["site", "gpu"]], ids=lambda files: "-".join(files)
)
def test_podman_compose_parses_the_files(files: list[str], tmp_path: Path) -> None:
    podman = tmp_path / "podman"  # parsing only asks for its version, and podman may be missing
    podman.write_text("#!/bin/sh\necho podman version 4.3.1\n")
    podman.chmod(0o755)
    chosen = [part for name in files for part in ("--file", str(DOCKER / f"compose.{name}.yml"))]
    read = subprocess.run(
        [
            *(sys.executable, "-m", "podman_compose", "--podman-path", str(podman)),
            *(*chosen, "config"),
        ],
        env={**os.environ, **VARIABLES},
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0, read.stderr
    (found,) = yaml.safe_load(read.stdout)["services"].values()
    expected = service(files[0])
    if "gpu" in files:
        (device,) = found.pop("deploy")["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"]) == ("nvidia", "all")
        assert "gpu" in device["capabilities"]
    assert found == expected


def test_dockerignore_allows_only_shipped_files() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    first, *rest, last = [line for line in lines if line and not line.startswith("#")]
    assert (first, last) == ("*", "**/__pycache__")
    assert all(line.startswith("!") for line in rest)
    for line in rest:
        assert list(ROOT.glob(line[1:])), f"{line} names nothing"
    packages = {"client", "configs", "mtl_model", "server", "simulation"}
    assert {f"!{package}" for package in packages} < set(rest)
    for package in packages:  # which are copied whole: source and presets, nothing else
        tracked = subprocess.run(
            ["git", "ls-files", package], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert {Path(name).suffix for name in tracked.stdout.split()} <= {".py", ".toml"}


def test_runtime_stage_is_unprivileged_and_installs_nothing() -> None:
    result = DOCKERFILE[DOCKERFILE.index("AS runtime") :]
    assert "\nRUN" not in result
    assert "USER ${UID}:${GID}" in result
    for setting in (
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
        "FLWR_DISABLE_UPDATE_CHECK=1",
        "FLWR_TELEMETRY_ENABLED=0",
        "FLWR_HOME=/var/lib/polyclinic/flwr",
        "HOME=/tmp",
        "NO_ALBUMENTATIONS_UPDATE=1",
        "PYTHONDONTWRITEBYTECODE=1",
        "TMPDIR=/tmp",
        "XDG_CACHE_HOME=/tmp/cache",
    ):
        assert setting in result, setting


def test_dockerfile_pins_packages_and_keeps_no_cache() -> None:
    installs = re.findall(r"pip [^#\n]*?install ([^&\n]*)", DOCKERFILE.replace("\\\n", " "))
    assert len(installs) == 4
    for install in installs:
        assert "--no-cache-dir" in install
        assert any(how in install for how in ("constraints.txt", "--no-deps", "==")), install
