"""The documented commands exist and have tests; long ones are run elsewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import polyclinic
from tests import ROOT

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/data.md",
    "docs/model.md",
    "docs/export.md",
    "docs/architecture.md",
    "docs/privacy.md",
    "docs/reliability.md",
    "docs/strategies.md",
    "docs/deploy.md",
    "SECURITY.md",
    *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*/*.md")),
)
# where each command is actually run
RUN_ELSEWHERE = {
    "make demo": "tests/end_to_end/test_readme.py::test_demo_completes_its_first_round",
    "make test": ".ci/run",
    "make lint": ".ci/run",
    "make quick": ".ci/run",  # the same tests and more
    "make coverage": "",  # by hand: tests that CI has, slower
    "make containers": "",  # by hand: too long for CI
    "make long": "",  # by hand: too long for CI
    "make faults": "",  # too long for CI as well; .ci/run has a dozen of them
    "polyclinic simulate": "tests/end_to_end/test_simulate.py",
    "polyclinic runs": "tests/end_to_end/test_commands.py",
    "polyclinic compare": "tests/end_to_end/test_commands.py",
    "polyclinic settings": "tests/end_to_end/test_simulate.py",
    "polyclinic phantom": "tests/end_to_end/test_commands.py",
    "polyclinic model info": "tests/end_to_end/test_commands.py",
    "polyclinic bench model": "tests/simulation/benchmarks/test_bench.py",
    "polyclinic bench privacy": "tests/simulation/benchmarks/test_bench.py",
    "polyclinic bench memory": "tests/simulation/benchmarks/test_bench.py",
    "polyclinic bench audit": "tests/simulation/attacks/test_audit.py",
    "polyclinic bench inversion": "tests/simulation/attacks/test_inversion.py",
    "polyclinic tradeoff": "tests/simulation/experiments/test_tradeoff.py",
    "polyclinic site ledger": "tests/client/ledger/test_ledger_commands.py",
    "polyclinic site lower-delta": "tests/client/ledger/test_ledger_commands.py",
    "polyclinic site outgoing": "tests/client/policy/test_site_policy.py",
    "polyclinic site release": "tests/client/policy/test_site_policy.py",
    "polyclinic site approve": "tests/client/policy/test_approvals.py",
    "polyclinic site keygen": "tests/server/deployment/test_provision.py",
    "polyclinic site": "tests/deployment/test_deployment.py",  # preflight, start, status, health
    "polyclinic server sign": "tests/client/policy/test_approvals.py",
    "polyclinic server": "tests/deployment/test_deployment.py",
    "polyclinic export": "tests/server/export/test_export.py",
    "polyclinic predict": "tests/client/test_predict.py",
    "flwr build": "tests/end_to_end/test_bundle.py",
    "flwr run": "tests/end_to_end/test_simulate.py",
    "tensorboard": "",  # not ours
    "export": "tests/end_to_end/test_simulate.py",
    "git clone": "",
}


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.partition(" #")[0].strip()
                if re.match(r"(make|polyclinic|flwr|tensorboard|export|git) ", command):
                    found.append((page, command))
    return found


def test_every_documented_command_has_a_test() -> None:
    assert len(commands()) > 8
    for page, command in commands():
        assert any(command.startswith(known) for known in RUN_ELSEWHERE), f"{page}: {command}"
    for place in filter(None, RUN_ELSEWHERE.values()):
        path, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text() if name else (ROOT / path).exists(), (
            place
        )


@pytest.mark.parametrize(
    "command", sorted({c for _, c in commands() if c.startswith("polyclinic")})
)
def test_documented_options_exist(command: str) -> None:
    words = shlex.split(command)
    group = (
        words[1:3]
        if words[1] in ("runs", "model", "bench", "site", "server") and len(words) > 2
        else words[1:2]
    )
    wide = {"COLUMNS": "200", "TERM": "dumb"}
    shown = CliRunner(env=wide).invoke(polyclinic.command_line(), [*group, "--help"])
    assert shown.exit_code == 0, shown.output
    for word in words:
        if word.startswith("--"):
            assert word in shown.output, command


@pytest.mark.parametrize("page", PAGES)
def test_documented_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for path in re.findall(r"`((?:configs|tests|docs|server|client|simulation)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def demo(out: Path, *more: str) -> dict:
    """Run what ``make demo`` runs after installing, and return its results."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "polyclinic"), "simulate", "--json"),
            *("--config", str(ROOT / "configs/demo.toml"), "--out", str(out), *more),
        ],
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results["sites"]) == 3
    return results


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)  # it takes 150 s on a quiet machine
def test_demo_reaches_the_documented_accuracy(tmp_path: Path) -> None:
    """Every site at Dice 0.75 and accuracy 0.85."""
    for name, site in demo(tmp_path)["sites"].items():
        assert site["dice"] >= 0.75, name
        assert site["accuracy"] >= 0.85, name


@pytest.mark.slow
def test_demo_completes_its_first_round(tmp_path: Path) -> None:
    """Runs the first round; a long test runs all fifteen and checks their accuracy."""
    assert demo(tmp_path, "--rounds", "1")["round"] == 1
