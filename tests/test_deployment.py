"""Deployed sites: a SuperLink and two SuperNodes as processes, each site placed by its own file.

Without TLS, on loopback alone; certificates and keys come with provisioning.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import TINY, free_port

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(sys.executable).parent


@pytest.mark.slow
def test_two_deployed_sites_train_together(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        log = tmp_path / f"{arguments[0]}-{len(running)}.log"
        with log.open("wb") as out:
            return subprocess.Popen(
                [str(PROGRAMS / arguments[0]), *arguments[1:]],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [str(PROGRAMS / arguments[0]), *arguments[1:]],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=240,
        )
        return done.stdout

    call(
        "polyclinic", "phantom", "--out", str(tmp_path / "data"), "--sites", "2", "--examples", "16"
    )
    running: list[subprocess.Popen[bytes]] = []
    try:
        host, port = address.split(":")
        running.append(start("flower-superlink", "--insecure", "--host", host, "--port", port))
        time.sleep(5)  # a SuperNode that finds no SuperLink waits long before it tries again
        for number in (1, 2):
            site = tmp_path / f"north-{number}.yaml"
            site.write_text(f"name: north-{number}\ndata-root: data/site-{number}\n")
            node = ("--node-config", f'site-config="{site}"', "--port", str(free_port()))
            running.append(start("flower-supernode", "--insecure", "--superlink", address, *node))
        changes = {**TINY, "run.output-dir": str(tmp_path), "run.name": "run", "rounds.count": 1}
        changes["rounds.min-sites"] = "2"
        words = [w for key, value in changes.items() for w in ("--set", f"{key}={value}")]
        (tmp_path / "run.toml").write_text(call("polyclinic", "settings", *words))
        said = call("flwr", "run", str(ROOT), "own", "--stream", "-c", str(tmp_path / "run.toml"))
        assert (
            json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "completed"
        ), said
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert set(results["sites"]) == {"north-1", "north-2"}
    finally:
        family = [p for r in running for p in psutil.Process(r.pid).children(recursive=True)]
        for process in [*running, *family]:
            process.kill()
        for process in running:
            process.wait()
