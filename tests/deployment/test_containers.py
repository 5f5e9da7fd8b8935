"""The container images, built and run: their contents and the rights of their processes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.configs import VERSION
from polyclinic.configs.ports import free_port
from polyclinic.configs.run import RunConfig
from polyclinic.server.deployment.provision import provision
from polyclinic.server.runs.folder import RunFolder, to_toml
from polyclinic.server.runs.history import read_history
from polyclinic.simulation.phantom.writer import write_phantoms
from tests import ROOT
from tests.conftest import TINY
from tests.containers.podman import PODMAN, build, podman_run_arguments, why_no_containers
from tests.factories import federation
from tests.faults.deployment import events

pytestmark = [
    pytest.mark.containers,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first test builds 7 GB
]

USER = 12345  # not the image's user: a site's state belongs to one of its own users
TARGETS = ("coordinator", "site")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build all images; returns the image's name by target."""
    why = why_no_containers()
    if why and os.environ.get("POLYCLINIC_CONTAINERS") == "required":
        pytest.fail(why)
    if why:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("build")
    return {target: build(target, VERSION, folder / target) for target in TARGETS}


@pytest.fixture(scope="module")
def kits(
    images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, str]]]:
    """Prepare for each image a folder with its compose file, and the values of its .env file."""
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
    """Run a program in a container of an image and return its output."""
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
    """Return the properties of a container that runs by its compose file."""
    probe = (ROOT / "tests" / "containers" / "probe.py").read_text(encoding="utf-8")
    return json.loads(run(kits[request.param], "python", "-", stdin=probe))


def test_container_runs_unprivileged(inside: dict[str, Any]) -> None:
    assert (inside["uid"], inside["gid"]) == (USER, USER)
    assert set(inside["capabilities"]) == {"0" * 16}
    assert inside["no new privileges"] == "1"


def test_container_can_write_only_state_and_memory(inside: dict[str, Any]) -> None:
    assert inside["writable"] == ["/tmp", "/dev/shm", "/var/lib/polyclinic"]
    assert inside["tmp"][2] == "tmpfs"
    assert {"noexec", "nosuid", "nodev"} < set(inside["tmp"][3].split(","))
    assert inside["shm bytes"] >= 256 << 20


def test_container_modules_are_compiled_and_in_one_folder(inside: dict[str, Any]) -> None:
    ours, packages = inside["imported"][:2], inside["imported"][2:]
    assert all(path.startswith("/opt/polyclinic/") for path in ours)
    assert all(path.startswith("/opt/venv/") for path in packages)
    assert inside["compiled"] > 50


def test_image_contains_no_build_leftovers(inside: dict[str, Any]) -> None:
    assert inside["builders"] == []
    assert inside["test packages"] == []
    assert inside["leftovers"] == []


@pytest.mark.parametrize("target", TARGETS)
def test_image_has_no_cache_in_root_home(
    target: str, kits: dict[str, tuple[Path, dict[str, str]]]
) -> None:
    assert set(run(kits[target], "ls", "-A", "/root", root=True).split()) <= {".bashrc", ".profile"}


def test_image_environment_disables_internet_access(inside: dict[str, Any]) -> None:
    environment = inside["environment"]
    for name in (
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
        "FLWR_DISABLE_UPDATE_CHECK",
        "NO_ALBUMENTATIONS_UPDATE",
    ):
        assert environment[name] == "1", name
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_HOME"] == "/var/lib/polyclinic/flwr"


def test_sbom_matches_constraints(inside: dict[str, Any]) -> None:
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
def test_image_command_line_prints_version(
    target: str, kits: dict[str, tuple[Path, dict[str, str]]]
) -> None:
    assert run(kits[target], "polyclinic", "--version").strip() == VERSION


@pytest.mark.parametrize("target", TARGETS)
def test_image_labels_version_and_sets_unprivileged_user(
    target: str, images: dict[str, str]
) -> None:
    told = subprocess.run(
        [*PODMAN, "image", "inspect", images[target]], capture_output=True, text=True, check=True
    )
    (image,) = json.loads(told.stdout)
    assert image["Config"]["User"] == "10001:10001"
    assert image["Labels"]["org.opencontainers.image.version"] == VERSION
    started = {"coordinator": ["server", "start"], "site": ["site", "start"]}
    assert image["Config"]["Entrypoint"] == ["polyclinic"]
    assert image["Config"]["Cmd"][:2] == started[target]


def test_coordinator_image_builds_its_own_release(
    kits: dict[str, tuple[Path, dict[str, str]]],
) -> None:
    compose, variables = kits["coordinator"]
    script = "cd /var/lib/polyclinic && flwr build --app /opt/polyclinic"
    run((compose, variables), "sh", "-c", script)
    (release,) = Path(variables["POLYCLINIC_STATE"]).glob("*.fab")
    assert VERSION.replace(".", "-") in release.name


class Containers:
    """A coordinator and its sites as containers, each from its generated kit."""

    def __init__(self, place: Path, sites: tuple[str, ...]) -> None:
        self.place = place
        self.sites = sites
        self.prefix = f"polyclinic-test-{os.getpid()}"
        self.kits = place / "kits"
        self.variables: dict[str, dict[str, str]] = {}
        server_ = {"address": "127.0.0.1", "port": free_port()}
        self.provisioned = time.monotonic()
        provision(federation(*sites, server=server_), self.kits)
        write_phantoms(
            place / "data", sites=len(sites), examples=14, seed=0, size=48, normal_fraction=0.0
        )
        for i, name in enumerate(("coordinator", *sites)):
            (place / "state" / name).mkdir(parents=True)
            self.variables[name] = {
                "POLYCLINIC_VERSION": VERSION,
                "POLYCLINIC_UID": str(USER),
                "POLYCLINIC_GID": str(USER),
                "POLYCLINIC_PORT": str(server_["port"]),
                "POLYCLINIC_STATE": str(place / "state" / name),
                "POLYCLINIC_DATA": str(place / "data" / f"site-{i}"),
            }
        for name in sites:  # filled in by a site's engineer
            file = self.kit(name) / "site.yaml"
            file.write_text(file.read_text().replace("min-support: 10", "min-support: 1"))
        for path in place.rglob("*"):
            os.chown(path, USER, USER)

    def kit(self, name: str) -> Path:
        return self.kits / "server" if name == "coordinator" else self.kits / "sites" / name

    def arguments(self, name: str, *options: str) -> list[str]:
        # on the host network, two sites need two health ports
        health = free_port() if name in self.sites[1:] else 0
        more = [f"--env=POLYCLINIC_HEALTH=127.0.0.1:{health}"] if health else []
        compose = self.kit(name) / "compose.yml"
        return podman_run_arguments(compose, self.variables[name], *options, *more)

    def up(self, name: str) -> None:
        self.podman(self.arguments(name, "--detach", f"--name={self.prefix}-{name}"))

    def once(self, name: str, *command: str, options: tuple[str, ...] = ()) -> str:
        """Run a command in a new container, as `docker compose run --rm` does."""
        return self.podman([*self.arguments(name, "--rm", *options), *command])

    def inside(self, name: str, *command: str) -> str:
        """Run a command in the running container, as `docker compose exec` does."""
        return self.podman([*PODMAN, "exec", f"{self.prefix}-{name}", *command])

    def healthy(self, name: str) -> bool:
        ask = [*PODMAN, "healthcheck", "run", f"{self.prefix}-{name}"]
        return subprocess.run(ask, capture_output=True, check=False).returncode == 0

    def podman(self, command: list[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def wait_for(self, happened: Callable[[], object], seconds: float, what: str) -> None:
        ends = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < ends, f"not within {seconds:g} s: {what}{self.logs()}"
            time.sleep(1)

    def logs(self) -> str:
        texts = ["\n"]
        for name in ("coordinator", *self.sites):
            ask = [*PODMAN, "logs", "--tail=15", f"{self.prefix}-{name}"]
            done = subprocess.run(ask, capture_output=True, text=True, check=False)
            texts.append(f"--- {name}\n{done.stdout}{done.stderr}")
        return "".join(texts)

    def stop(self) -> None:
        for name in ("coordinator", *self.sites):
            command = [*PODMAN, "rm", "--force", "--time=5", f"{self.prefix}-{name}"]
            subprocess.run(command, capture_output=True, check=False)


@pytest.fixture(scope="module")
def containers(
    images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Containers]:
    made = Containers(tmp_path_factory.mktemp("consortium"), ("north", "south"))
    try:
        yield made
    finally:
        made.stop()


def test_federation_from_kits_survives_a_site_restart(
    containers: Containers, capsys: pytest.CaptureFixture[str]
) -> None:
    """Follows the kits' README, with podman in place of docker compose."""
    place = containers
    place.up("coordinator")
    place.wait_for(lambda: place.healthy("coordinator"), 300, "the coordinator is healthy")
    place.inside(
        "coordinator", "sh", "-c", "cd /var/lib/polyclinic && flwr build --app /opt/polyclinic"
    )
    (release,) = (place.place / "state" / "coordinator").glob("*.fab")
    for site in place.sites:
        lent = (f"--volume={release}:/var/release.fab:ro",)
        said = place.once(
            *(site, "site", "approve", "/etc/polyclinic/site.yaml", "/var/release.fab", "--yes"),
            options=lent,
        )
        assert "approved: " in said
        place.up(site)
    for site in place.sites:
        place.wait_for(lambda site=site: place.healthy(site), 400, f"{site} is healthy")
    settings = {
        **TINY,
        "run.name": "first",
        "rounds.min-sites": "1",
        "rounds.count": 3,
        "rounds.deadline-s": 180.0,
        "evaluate.select-by": "dice",
    }
    file = place.place / "state" / "coordinator" / "run.toml"
    file.write_text(to_toml(RunConfig.from_flat(settings)))
    os.chown(file, USER, USER)
    place.inside(
        *("coordinator", "flwr", "run", "/opt/polyclinic", "polyclinic"),
        *("-c", "/var/lib/polyclinic/run.toml"),
    )
    folder = RunFolder(place.place / "state" / "coordinator" / "runs" / "first")
    place.wait_for(lambda: 1 in folder.checkpoints(), 500, "the first round is saved")
    first = time.monotonic() - place.provisioned
    gone = f"{place.prefix}-south"
    place.podman([*PODMAN, "stop", "--time=20", gone])
    place.podman([*PODMAN, "start", gone])
    place.wait_for(lambda: place.healthy("south"), 400, "south is healthy again")
    place.wait_for(folder.outcome.exists, 900, "the run ends")
    assert folder.read_outcome()["status"] == "completed", folder.read_outcome()
    lines = read_history(folder.history)
    tested = {line.site: line.metrics for line in lines if line.split == "test"}
    assert set(tested) == {"north", "south", "pooled"}
    assert all(metrics is not None for metrics in tested.values())
    joined = [e for e in events(folder) if e["event"] == "joined"]
    lost = {phase for line in lines if line.site == "south" for phase in line.lost}
    assert joined or lost or any(line.left_out for line in lines)  # its absence is recorded
    for name in ("coordinator", *place.sites):
        assert place.inside(name, "id", "-u").strip() == str(USER)
        refused = subprocess.run(
            [*PODMAN, "exec", f"{place.prefix}-{name}", "touch", "/opt/polyclinic/x"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode != 0
        assert "Read-only file system" in refused.stderr
    said = json.loads(place.inside("coordinator", "polyclinic", "server", "status", "--json"))
    assert {site["name"]: site["status"] for site in said["sites"]} == {
        "north": "online",
        "south": "online",
    }
    with capsys.disabled():
        print(f"\nfrom provision to the first round: {first:.0f} s")
