"""The tradeoff command: its runs, resuming, and its table."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from polyclinic.configs.errors import ConfigError
from polyclinic.server.runs.folder import to_toml
from polyclinic.simulation.experiments.tradeoff import Setting, next_folder, settings_of, table
from tests.conftest import TINY


def test_settings_of_combines_epsilons_and_units() -> None:
    assert settings_of("inf,3,1", "example,patient") == [
        Setting(math.inf, "none"),
        Setting(3.0, "example"),
        Setting(3.0, "patient"),
        Setting(1.0, "example"),
        Setting(1.0, "patient"),
    ]
    assert [s.name for s in settings_of("inf,0.5", "patient")] == ["none", "0.5-patient"]


@pytest.mark.parametrize(
    ("epsilons", "units", "said"),
    [
        ("3,0", "patient", r"--epsilons: expected numbers above 0 or inf, got '0'"),
        ("nan", "patient", "got 'nan'"),
        ("little", "patient", "got 'little'"),
        ("3", "person", r"--units: expected some of example, patient, got 'person'"),
    ],
)
def test_invalid_epsilons_and_units_are_refused(epsilons: str, units: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_of(epsilons, units)


def test_table_shows_means_and_ranges() -> None:
    def values(a: float | None, b: float) -> dict[str, dict[str, float | None]]:
        return {"a": {"dice": a}, "pooled": {"dice": b}}

    found = {
        Setting(math.inf, "none"): [values(0.8, 0.6), values(0.6, 0.7)],
        Setting(3.0, "patient"): [values(None, 0.2), values(0.5, 0.4)],
    }
    laid = table("Dice", found, "dice")
    assert [list(column.cells) for column in laid.columns] == [
        ["no privacy", "3"],
        ["", "patient"],
        ["0.700 (0.600-0.800)", "0.500"],
        ["0.650 (0.600-0.700)", "0.300 (0.200-0.400)"],
    ]


def test_next_folder_retries_stopped_runs_and_refuses_other_settings(tiny) -> None:
    wanted = tiny(run__name="t-none-0")
    first = next_folder(wanted)
    assert first.name == "t-none-0"
    first.path.mkdir(parents=True)
    first.config.write_text(to_toml(wanted))
    again = next_folder(wanted)
    assert again.name == "t-none-0-try2"
    again.path.mkdir()
    again.config.write_text(to_toml(wanted))
    again.results.write_text("{}")
    assert next_folder(wanted) == again
    with pytest.raises(ConfigError, match=r"got one with a different rounds\.count; choose a"):
        next_folder(tiny(run__name="t-none-0", rounds__count=7))


@pytest.mark.slow
@pytest.mark.long
def test_tradeoff_reuses_finished_runs(tmp_path: Path) -> None:
    settings = {
        **TINY,
        "phantom.sites": 2,
        "phantom.examples": 40,
        "rounds.count": 1,
        "data.split": "independent",
        "data.val-fraction": 0.25,
        "loss.class-weights": "none",
        "privacy.delta": 1e-3,
        "train.local-steps": 2,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [str(Path(sys.executable).parent / "polyclinic"), "tradeoff", "--json", *words]
    command += ["--epsilons", "8", "--units", "patient", "--seeds", "0", "--out", str(tmp_path)]
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
        for _ in range(2)
    )
    (private,) = json.loads(first.stdout)
    assert (private["epsilon"], private["unit"]) == (8.0, "patient")
    assert set(private["spent"]) == {"site-1", "site-2"}
    assert all(7.5 < epsilon <= 8 for epsilon in private["spent"].values())
    assert again.stdout == first.stdout
    assert again.stderr.count("already finished") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tradeoff-8-patient-0"]
