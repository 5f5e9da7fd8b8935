"""A consortium set up as in docs/deploy.md: kits, started by polyclinic's own commands."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil
import yaml

from polyclinic.client.data.split_key import SPLIT_KEY
from polyclinic.configs.ports import free_port
from tests.faults.deployment import PROGRAMS, Deployment


class Consortium(Deployment):
    """A coordinator and its sites from generated kits, until ``stop``."""

    connection = "polyclinic"

    def __init__(self, folder: Path, sites: int = 2) -> None:
        super().__init__(folder, sites)
        self.kits = folder / "kits"
        self.state = folder / "coordinator"
        self.runs = self.state / "runs"
        self.control = free_port()
        self.health = {name: f"127.0.0.1:{free_port()}" for name in ("server", *self.names)}
        self.environment["FLWR_HOME"] = str(self.state / "flwr")
        self.state.mkdir()
        self.provision(self.names)
        self.release = self.pack(self.app)

    def provision(self, names: list[str], *options: str) -> str:
        """Write federation.yaml and generate kits from it; returns the command's output."""
        file = self.folder / "federation.yaml"
        server = {"address": "127.0.0.1", "port": self.port}
        content = {"name": "tests", "server": server, "sites": [{"name": n} for n in names]}
        file.write_text(yaml.safe_dump(content))
        return self.polyclinic("server", "provision", file, "--out", self.kits, *options)[1]

    def pack(self, app: Path) -> Path:
        """Pack an app as the coordinator sends it to sites."""
        place = self.folder / f"packed-{app.name}"
        place.mkdir()
        subprocess.run(
            [PROGRAMS / "flwr", "build", "--app", app],
            cwd=place,
            env=self.environment,
            check=True,
            capture_output=True,
        )
        (found,) = place.glob("*.fab")
        return found

    def start(self) -> None:
        self.start_superlink()
        for name in self.names:
            self.fill_in(name)
            status, said = self.polyclinic(
                "site", "approve", self.site_file(name), self.release, "--yes"
            )
            assert status == 0, said
            self.start_site(name)
        self.wait_for(lambda: self.online() == set(self.names), 240, "all sites are online")

    def start_superlink(self) -> None:
        self.superlink = self._spawn(
            "superlink",
            "polyclinic",
            *("server", "start", "--kit", str(self.kits / "server"), "--state", str(self.state)),
            *("--host", "127.0.0.1", "--control", str(self.control)),
            *("--health", self.health["server"]),
        )
        self.wait_for(lambda: self.well("server"), 240, "the coordinator is well")

    def start_site(self, name: str, environment: dict[str, str] | None = None) -> psutil.Popen:
        again = ("-c", 'while :; do "$@"; sleep 2; done', "site")  # restarted like a container
        home = {"FLWR_HOME": str(self.folder / "state" / name / "flwr")}
        self.nodes[name] = self._spawn(
            name,
            "sh",
            *(*again, str(PROGRAMS / "polyclinic"), "site", "start", str(self.site_file(name))),
            *("--health", self.health[name]),
            environment=home | (environment or {}),
        )
        return self.nodes[name]

    def site_file(self, name: str) -> Path:
        return self.folder / "at" / name / "site.yaml"

    def fill_in(self, name: str, **changes: object) -> None:
        """Copy a site's kit and fill in its site.yaml, as a site's engineer does."""
        file = self.site_file(name)
        shutil.rmtree(file.parent, ignore_errors=True)
        shutil.copytree(self.kits / "sites" / name, file.parent)
        content = yaml.safe_load(file.read_text())
        content["data-root"] = str(self.folder / "data" / name)
        content["state"] = str(self.folder / "state" / name)
        content["server"]["port"] = self.start_wire(name).port
        content["policy"]["min-support"] = 1
        self.write_split_key(self.folder / "state" / name)
        file.write_text(yaml.safe_dump(content | changes))

    def write_split_key(self, state: Path) -> None:
        """Write a fixed split key: a random one may leave a small site without test images."""
        state.mkdir(parents=True, exist_ok=True)
        (state / SPLIT_KEY).write_text("07" * 32 + "\n")
        (state / SPLIT_KEY).chmod(0o600)

    def well(self, name: str) -> bool:
        """Run the container's health check for a site or the server."""
        if name == "server":
            where = ("server", "health", "--kit", self.kits / "server")
        else:
            where = ("site", "health", self.site_file(name))
        return self.polyclinic(*where, "--health", self.health[name])[0] == 0

    def status(self) -> dict[str, Mapping]:
        """Return the output of `polyclinic server status` by site."""
        said = self.polyclinic(
            *("server", "status", "--kit", self.kits / "server", "--state", self.state),
            *("--control", str(self.control), "--json"),
        )[1]
        return {site["name"]: site for site in json.loads(said)["sites"]}

    def online(self) -> set[str]:
        return {name for name, site in self.status().items() if site["status"] == "online"}

    def polyclinic(self, *arguments: str | Path) -> tuple[int, str]:
        """Run a polyclinic command; returns its exit status and its output."""
        done = subprocess.run(
            [str(PROGRAMS / "polyclinic"), *map(str, arguments)],
            cwd=self.working_folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )
        return done.returncode, done.stdout

    def copy_kit(self, name: str, aside: str) -> Path:
        """Copy a site's kit to another folder and return the copy's site.yaml."""
        target = self.folder / aside
        shutil.copytree(self.site_file(name).parent, target)
        return target / "site.yaml"
