"""The ``site ledger`` and ``site lower-delta`` commands."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from polyclinic.client.ledger.budget import LEDGER, Cohort, Ledger, read_accounts
from polyclinic.client.privacy.accounting import DpEvent, epsilon, epsilon_rdp
from tests.factories import head_of, without_triggers

NORTH = Cohort("north", "patient", 400)
DELTA = 1e-3
TEN = DpEvent(1.0, 0.05, 10)

SITE = """
name: clinic
data-root: images
cohort: {{name: north, patients: {patients}, examples: 900}}
budget: {{epsilon: 8, delta: {delta}, unit: patient}}
data: {{classes: [a, b], mask-classes: [c], val-fraction: 0.1, test-fraction: 0.1}}
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(SITE.format(patients=400, delta=DELTA))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / LEDGER


def train(path: Path, cap: float | None = 8.0, delta: float = DELTA) -> None:
    """Write two rounds of a run, the second with fewer steps, and an unsettled one."""
    with Ledger(path, NORTH, delta, cap) as ledger:
        ledger.settle(ledger.reserve("4711", 1, TEN), 10)
        ledger.settle(ledger.reserve("4711", 2, TEN), 4)
        ledger.reserve("4712", 1, TEN)


def test_ledger_command_shows_spent_and_left_by_round(cli, site: Path, path: Path) -> None:
    train(path)
    status, out, err = cli("site", "ledger", site)
    assert (status, err) == (0, "")
    history = [TEN, replace(TEN, steps=4), TEN]
    after = [epsilon(history[:i], DELTA) for i in (1, 2, 3)]
    words = " ".join(out.split())
    assert words.index("run 4711") < words.index("run 4712")
    assert f"1 10 10 1 0.05 {after[0]:.4g} 2 10 4 1 0.05 {after[1]:.4g} run 4712" in words
    assert f"1 10 all, not settled 1 0.05 {after[2]:.4g}" in words
    spent, rdp = after[2], epsilon_rdp(history, DELTA)
    assert f"epsilon {spent:.4g} of 8, left {8 - spent:.4g}, at delta 0.001" in out
    assert f"(an RDP accountant would report {rdp:.4g})" in out
    assert "per patient of cohort north (400 declared)" in out
    assert "verified" not in out


def test_ledger_json_contains_all_fields(cli, site: Path, path: Path) -> None:
    train(path)
    status, out, err = cli("site", "ledger", site, "--json", "--verify")
    assert (status, err) == (0, "")
    told = json.loads(out)
    spent = epsilon([TEN, replace(TEN, steps=4), TEN], DELTA)
    assert told["spent"] == spent
    assert told["left"] == 8 - spent
    assert told["spent_rdp"] >= spent
    expected = {
        "ledger": str(path),
        "cohort": "north",
        "unit": "patient",
        "units": 400,
        "delta": DELTA,
        "cap": 8.0,
        "verified_entries": 6,
    }
    assert expected.items() <= told.items()
    assert [(r["run"], r["round"], r["reserved"], r["taken"]) for r in told["rounds"]] == [
        ("4711", 1, 10, 10),
        ("4711", 2, 10, 4),
        ("4712", 1, 10, None),
    ]
    assert told["rounds"][2]["epsilon"] == spent
    assert [terms["cap"] for terms in told["terms"]] == [8.0]


def test_ledger_shows_infinite_spending_without_cap(cli, site: Path, path: Path) -> None:
    with Ledger(path, NORTH, DELTA, None) as ledger:
        ledger.settle(ledger.reserve("4711", 1, DpEvent(0.0, 0.05, 1)), 1)
    status, out, _ = cli("site", "ledger", site)
    assert status == 0
    assert "epsilon inf no cap" in out
    told = json.loads(cli("site", "ledger", site, "--json")[1])
    assert (told["spent"], told["left"], told["cap"]) == ("infinity", None, None)
    assert told["rounds"][0]["epsilon"] == "infinity"


def test_ledger_shows_changed_terms_with_time(cli, site: Path, path: Path) -> None:
    train(path)
    Ledger(path, replace(NORTH, units=500), DELTA, 9.0).close()
    _, out, _ = cli("site", "ledger", site)
    when = read_accounts(path)["north"].terms[1].since[:19]
    assert f"{when}Z units: 400 -> 500" in out
    assert f"{when}Z cap: 8.0 -> 9.0" in out


@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_ledger_before_training_is_empty_and_creates_no_file(
    cli, site: Path, path: Path, verify: list[str]
) -> None:
    status, out, err = cli("site", "ledger", site, *verify)
    assert (status, out) == (0, "")
    assert "cohort north: nothing has been spent" in err
    status, out, _ = cli("site", "ledger", site, "--json", *verify)
    assert status == 0
    assert json.loads(out) == {"schema_version": 1, "ledger": str(path), "cohort": None}
    assert not path.parent.exists()


def test_ledger_verify_reports_entry_count(cli, site: Path, path: Path) -> None:
    train(path)
    status, out, err = cli("site", "ledger", site, "--verify")
    assert (status, err) == (0, "")
    assert f"verified 6 entries of {path}" in out


@pytest.mark.parametrize("options", [[], ["--verify"], ["--json"]])
def test_tampered_ledger_exits_1_and_names_the_entry(
    cli, site: Path, path: Path, options: list[str]
) -> None:
    train(path)
    give_steps_back(path)
    status, out, err = cli("site", "ledger", site, *options)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: .*ledger.db: entry 3 was changed: its hash .*backup.*\n", err)


def give_steps_back(path: Path) -> None:
    with without_triggers(path) as file:
        file.execute(
            "UPDATE entries SET content = replace(content, '\"steps\":10', '\"steps\":1') "
            "WHERE number = 3"
        )


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "entry 1 is missing"), (b"cats" * 999, "found no database"), (None, "found no file")],
)
def test_lost_or_damaged_ledger_exits_1(
    cli, site: Path, path: Path, content: bytes | None, said: str
) -> None:
    train(path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    status, out, err = cli("site", "ledger", site, "--verify")
    assert (status, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


def test_ledger_command_works_during_training(cli, site: Path, path: Path) -> None:
    with Ledger(path, NORTH, DELTA, 8.0) as ledger:
        reservation = ledger.reserve("4711", 1, TEN)
        status, out, _ = cli("site", "ledger", site, "--verify")
        assert status == 0
        assert "all, not settled" in out
        with ledger._chain.transaction():
            status, _, err = cli("site", "ledger", site, "--verify")
        assert (status, err) == (0, "")
        ledger.settle(reservation, 3)
    assert head_of(path).exists()


@pytest.mark.parametrize("command", ["ledger", "lower-delta"])
def test_missing_or_invalid_site_file_exits_2(cli, tmp_path: Path, command: str) -> None:
    status, out, err = cli("site", command, tmp_path / "none.yaml")
    assert (status, out) == (2, "")
    assert "no such site file" in err
    (tmp_path / "site.yaml").write_text(SITE.format(patients=400, delta=0.5))
    status, out, err = cli("site", command, tmp_path / "site.yaml")
    assert (status, out) == (2, "")
    assert "budget.delta: expected less than 1 / 400" in err


def test_lower_delta_is_recorded_and_applies_to_past_spending(cli, site: Path, path: Path) -> None:
    train(path)
    site.write_text(SITE.format(patients=4000, delta=1e-4))
    status, out, err = cli("site", "lower-delta", site)
    assert (status, err) == (0, "")
    assert out == "cohort north: delta is 0.0001 from now on\n"
    status, out, _ = cli("site", "ledger", site, "--verify")
    assert status == 0
    spent = epsilon([TEN, replace(TEN, steps=4), TEN], 1e-4)
    assert f"spent: epsilon {spent:.4g} of 8" in out
    assert "delta: 0.001 -> 0.0001" in out


def test_lower_delta_refuses_raise_repeat_and_unknown_cohort(cli, site: Path, path: Path) -> None:
    status, out, err = cli("site", "lower-delta", site)
    assert (status, out) == (1, "")
    assert "has no cohort north" in err
    assert not path.exists()
    train(path)
    for delta in (DELTA, 2e-3):
        site.write_text(SITE.format(patients=400, delta=delta))
        status, out, err = cli("site", "lower-delta", site)
        assert (status, out) == (1, "")
        assert f"below the present 0.001, got {delta:g}" in err
    site.write_text("name: north\ndata-root: images\n")
    status, out, err = cli("site", "lower-delta", site)
    assert (status, out) == (2, "")
    assert "expected a section budget" in err
    assert len(read_accounts(path)["north"].terms) == 1
