"""A cohort's privacy budget: reserving, settling, refusing rounds, and changing its terms."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyclinic.client.ledger.hash_chain
import polyclinic.client.private_round
from polyclinic.client.ledger.budget import (
    BudgetExceeded,
    Cohort,
    Ledger,
    LedgerError,
    LedgerTampered,
    Reservation,
    lower_delta,
    read_accounts,
    verify_ledger,
)
from polyclinic.client.ledger.hash_chain import Entry, HashChain
from polyclinic.client.policy.site_policy import OPEN, Decline
from polyclinic.client.privacy.accounting import DpEvent, epsilon, epsilon_rdp
from polyclinic.client.private_round import train_within_budget
from polyclinic.client.site import PrivacyDeclaration
from polyclinic.client.training.local_round import Round
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.site import BudgetConfig
from tests.factories import database, head_of, rewrite, texts_of

NORTH = Cohort("north", "patient", 1000)
DELTA = 1e-4
TEN = DpEvent(1.0, 0.05, 10)
BY_RDP = 1e-11  # so small that only the RDP bound is computed: milliseconds, not a second


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def opened(path: Path, cap: float | None = None, delta: float = DELTA, **cohort: Any) -> Ledger:
    return Ledger(path, replace(NORTH, **cohort), delta, cap, timeout_s=0.05)


def steps(path: Path) -> list[int]:
    return [spent.steps for spent in read_accounts(path)["north"].history()]


def written(path: Path) -> int:
    with HashChain(path, read_only=True) as chain:
        return chain.head.number


def test_reserve_spends_all_steps_and_settle_only_those_run(path: Path) -> None:
    with opened(path) as ledger:
        assert (ledger.spent(), ledger.left()) == (0.0, math.inf)
        reservation = ledger.reserve("run", 1, TEN)
        assert steps(path) == [10]
        assert ledger.spent() == epsilon([TEN], DELTA)
        ledger.settle(reservation, 4)
        assert steps(path) == [4]
        assert ledger.spent() == epsilon([replace(TEN, steps=4)], DELTA)
        ledger.settle(ledger.reserve("run", 2, TEN), 0)
        assert steps(path) == [4, 0]


def test_unsettled_reservation_stays_spent_after_restart(path: Path) -> None:
    with opened(path) as ledger:
        reservation = ledger.reserve("run", 1, TEN)
    with opened(path) as after_the_crash:
        with pytest.raises(LedgerError, match="not made by this process; it was not"):
            after_the_crash.settle(reservation, 0)
        after_the_crash.settle(after_the_crash.reserve("run", 1, TEN), 10)
    assert steps(path) == [10, 10]
    rows = read_accounts(path)["north"].rounds
    assert [row.taken for row in rows] == [None, 10]


def test_spent_epsilon_composes_over_rounds_runs_and_restarts(path: Path) -> None:
    other = DpEvent(2.0, 0.1, 7)
    for run in ("one", "two"):
        for number, spent in enumerate((TEN, other), 1):
            with opened(path) as ledger:
                ledger.settle(ledger.reserve(run, number, spent), spent.steps)
    with opened(path) as ledger:
        found = ledger.spent()
        assert found == epsilon([replace(TEN, steps=20), replace(other, steps=14)], DELTA)
        assert found <= ledger.spent_rdp() == epsilon_rdp([TEN, other, TEN, other], DELTA)
        assert found < 2 * epsilon(
            [TEN, other], DELTA
        )  # composition costs less than the sum of both
        assert [(row.run, row.round) for row in ledger.by_round()] == [
            ("one", 1),
            ("one", 2),
            ("two", 1),
            ("two", 2),
        ]
        after = [row.epsilon for row in ledger.by_round()]
        assert after == sorted(after)
        assert after[-1] == found


def test_budgets_of_two_cohorts_are_independent(path: Path) -> None:
    with opened(path) as north, opened(path, name="south") as south:
        north.reserve("run", 1, TEN)
        assert south.spent() == 0.0
        south.reserve("run", 1, replace(TEN, steps=1))
        assert north.spent() == epsilon([TEN], DELTA)
    accounts = read_accounts(path)
    assert {name: len(account.rounds) for name, account in accounts.items()} == {
        "north": 1,
        "south": 1,
    }


def test_cohort_with_more_units_keeps_its_spending(path: Path) -> None:
    with opened(path, cap=9.0) as ledger:
        ledger.reserve("run", 1, TEN)
    with opened(path, cap=9.0, units=1001) as ledger:
        assert ledger.spent() == epsilon([TEN], DELTA)
    assert [terms.units for terms in read_accounts(path)["north"].terms] == [1000, 1001]


def test_unchanged_terms_are_written_once(path: Path) -> None:
    for _ in range(3):
        opened(path, cap=3.0).close()
    assert written(path) == 1


def test_reserve_above_cap_is_refused_with_numbers_and_writes_nothing(path: Path) -> None:
    one, two = epsilon([TEN], DELTA), epsilon([TEN, TEN], DELTA)
    cap = (one + two) / 2
    with opened(path, cap) as ledger:
        ledger.reserve("run", 1, TEN)
        assert ledger.left() == pytest.approx(cap - one)
        before = written(path)
        with pytest.raises(BudgetExceeded) as refused:
            ledger.reserve("run", 2, TEN)
        assert written(path) == before
        assert refused.value.spent == pytest.approx(one)
        assert refused.value.cost == pytest.approx(two - one)
        assert refused.value.left == pytest.approx(cap - one)
        for number in (two - one, cap, cap - one, one):
            assert f"{number:.4g}" in str(refused.value)
        assert "cohort north" in str(refused.value)
        ledger.reserve("run", 2, replace(TEN, steps=1))  # a smaller round still fits
    assert steps(path) == [10, 1]


def test_reserve_exactly_up_to_cap_succeeds(path: Path) -> None:
    cap = epsilon([TEN, TEN], DELTA)
    with opened(path, cap) as ledger:
        ledger.reserve("run", 1, TEN)
        ledger.reserve("run", 2, TEN)
        assert ledger.left() == 0.0
        with pytest.raises(BudgetExceeded):
            ledger.reserve("run", 3, replace(TEN, steps=1))


def test_cap_below_cost_of_one_step_refuses_any_step(path: Path) -> None:
    with opened(path, cap=1e-3) as ledger:
        with pytest.raises(BudgetExceeded, match=r"of 0.001 there is 0.001 left \(0 spent\)"):
            ledger.reserve("run", 1, replace(TEN, steps=1))
        assert ledger.spent() == 0.0


def test_settling_fewer_steps_frees_budget(path: Path) -> None:
    with opened(path, cap=epsilon([TEN], DELTA)) as ledger:
        reservation = ledger.reserve("run", 1, TEN)
        with pytest.raises(BudgetExceeded):
            ledger.reserve("run", 2, replace(TEN, steps=5))
        ledger.settle(reservation, 5)
        ledger.reserve("run", 2, replace(TEN, steps=5))


def test_steps_without_noise_exceed_any_cap(path: Path) -> None:
    bare = DpEvent(0.0, 0.05, 1)
    with opened(path, cap=1e6) as ledger, pytest.raises(BudgetExceeded, match="epsilon inf"):
        ledger.reserve("run", 1, bare)
    with opened(path) as ledger:
        ledger.settle(ledger.reserve("run", 1, bare), 1)
        assert ledger.spent() == math.inf
        open_still = ledger.reserve("run", 2, TEN)
        assert open_still
    with opened(path, cap=1e6) as ledger:
        assert ledger.left() == 0.0
        with pytest.raises(BudgetExceeded):
            ledger.reserve("run", 3, TEN)
        ledger.verify()


@pytest.mark.parametrize("taken", [11, -1, 10**6])
def test_settle_outside_the_reserved_steps_is_refused(path: Path, taken: int) -> None:
    with opened(path) as ledger:
        reservation = ledger.reserve("run", 1, TEN)
        with pytest.raises(LedgerError, match=f"0 to 10 steps taken, got {taken};.*must not leave"):
            ledger.settle(reservation, taken)
    assert steps(path) == [10]


def test_settling_twice_is_refused(path: Path) -> None:
    with opened(path) as ledger:
        reservation = ledger.reserve("run", 1, TEN)
        ledger.settle(reservation, 10)
        with pytest.raises(LedgerError, match="settled already"):
            ledger.settle(reservation, 0)
    assert steps(path) == [10]


def test_reserving_zero_steps_is_refused(path: Path) -> None:
    with opened(path) as ledger, pytest.raises(LedgerError, match="steps to reserve, got none"):
        ledger.reserve("run", 1, replace(TEN, steps=0))


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"delta": 1e-3}, r"below 1 / 1000 \(patients declared\), got 0.001"),
        ({"delta": 0.5}, "below 1 / 1000"),
        ({"delta": 0.0}, "above 0"),
        ({"delta": -1e-5}, "above 0"),
        ({"delta": math.nan}, "above 0"),
        ({"units": 0}, "at least one such unit"),
        ({"unit": "ward"}, "unit of example, patient"),
        ({"name": ""}, "expected a name"),
        ({"cap": 0.0}, "epsilon above 0 as cap, got 0"),
        ({"cap": -1.0}, "got -1"),
        ({"cap": math.nan}, "got nan"),
        ({"cap": math.inf}, "got inf"),
    ],
)
def test_invalid_terms_are_refused_before_file_creation(
    path: Path, terms: dict[str, Any], said: str
) -> None:
    with pytest.raises(LedgerError, match=said):
        opened(path, **terms)
    assert list(path.parent.iterdir()) == []


def test_terms_may_change_before_any_spending(path: Path) -> None:
    for terms in ({"unit": "example"}, {"delta": 1e-6}, {"delta": 1e-5}, {"cap": 2.0}, {}):
        opened(path, **terms).close()
    assert len(read_accounts(path)["north"].terms) == 5


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"unit": "example"}, "spent its budget by patient, .* got example"),
        ({"delta": 5e-4}, "at delta 0.0001, expected that delta, got 0.0005"),
        ({"delta": 1e-6}, "polyclinic site lower-delta"),
    ],
)
def test_terms_change_after_spending_is_refused(
    path: Path, terms: dict[str, Any], said: str
) -> None:
    with opened(path) as ledger:
        ledger.reserve("run", 1, TEN)
    before = written(path)
    with pytest.raises(LedgerError, match=said):
        opened(path, **terms)
    assert written(path) == before


def test_cap_changes_are_allowed_and_recorded(path: Path) -> None:
    with opened(path, cap=20.0) as ledger:
        ledger.reserve("run", 1, TEN)
    with opened(path, cap=0.1) as ledger:
        assert ledger.left() == 0.0
        with pytest.raises(BudgetExceeded):
            ledger.reserve("run", 2, TEN)
    with opened(path, cap=30.0) as ledger:
        ledger.reserve("run", 2, TEN)
        ledger.verify()
    assert [terms.cap for terms in read_accounts(path)["north"].terms] == [20.0, 0.1, 30.0]


def test_reserve_after_another_process_changed_terms_is_refused(path: Path) -> None:
    with opened(path, cap=20.0) as ledger:
        opened(path, cap=3.0).close()
        with pytest.raises(LedgerError, match=r"another process changed the terms.*cap 3, delta"):
            ledger.reserve("run", 1, TEN)
    assert read_accounts(path)["north"].rounds == []


def test_lower_delta_applies_to_past_spending(path: Path) -> None:
    with opened(path, cap=20.0) as ledger:
        ledger.settle(ledger.reserve("run", 1, TEN), 10)
    lower_delta(path, "north", 1e-6)
    with pytest.raises(LedgerError, match="at delta 1e-06"):
        opened(path, cap=20.0)
    with opened(path, cap=20.0, delta=1e-6) as ledger:
        assert ledger.spent() == epsilon([TEN], 1e-6) > epsilon([TEN], DELTA)
        ledger.settle(ledger.reserve("run", 2, TEN), 3)
        ledger.verify()


@pytest.mark.parametrize("delta", [1e-4, 2e-4, 0.0, -1.0, math.nan])
def test_lower_delta_refuses_equal_higher_or_invalid_values(path: Path, delta: float) -> None:
    opened(path).close()
    with pytest.raises(LedgerError, match=r"above 0 and below the present 0.0001, got"):
        lower_delta(path, "north", delta)
    assert written(path) == 1


def test_lower_delta_of_unknown_cohort_is_refused(path: Path) -> None:
    with pytest.raises(LedgerError, match="has no cohort north"):
        lower_delta(path, "north", 1e-6)
    assert not path.exists()


def test_concurrent_ledgers_share_the_remaining_budget(path: Path) -> None:
    cap = (epsilon([TEN], DELTA) + epsilon([TEN, TEN], DELTA)) / 2
    with opened(path, cap) as one, opened(path, cap) as other:
        reservation = one.reserve("one", 1, TEN)
        with pytest.raises(BudgetExceeded):
            other.reserve("other", 1, TEN)
        one.settle(reservation, 0)
        # the other ledger's cached entries are outdated; the file decides
        other.reserve("other", 1, TEN)
        with pytest.raises(BudgetExceeded):
            one.reserve("one", 2, TEN)


@dataclass
class Booked:
    """A reservation in the list model of the ledger."""

    reservation: Reservation
    by: int
    taken: int | None = None

    @property
    def counts(self) -> int:
        return self.reservation.spent.steps if self.taken is None else self.taken


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "settle", "crash"]),
        st.integers(0, 1),
        st.integers(1, 40),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(acts=ACTS, room=st.integers(1, 100))
def test_ledger_of_two_processes_matches_a_list_model(
    acts: list[tuple[str, int, int]], room: int
) -> None:
    """The ledger never exceeds the cap and never refuses a round that fits."""
    cap = epsilon([replace(TEN, steps=room)], BY_RDP)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        ledgers = [opened(path, cap, BY_RDP) for _ in range(2)]
        booked: list[Booked] = []
        for act, who, count in acts:
            mine = [b for b in booked if b.by == who and b.taken is None]
            used = sum(b.counts for b in booked)
            if act == "crash":
                ledgers[who].close()
                ledgers[who] = opened(path, cap, BY_RDP)
                for lost in mine:
                    lost.by = -1
            elif act == "settle" and mine:
                mine[0].taken = min(count, mine[0].counts)
                ledgers[who].settle(mine[0].reservation, mine[0].taken)
            elif act == "reserve" and used + count <= room:
                spent = replace(TEN, steps=count)
                booked.append(Booked(ledgers[who].reserve("run", len(booked), spent), who))
            elif act == "reserve":
                with pytest.raises(BudgetExceeded):
                    ledgers[who].reserve("run", 0, replace(TEN, steps=count))
            if booked:
                assert steps(path) == [b.counts for b in booked]
        for ledger in ledgers:
            ledger.close()
        verify_ledger(path)


def history(path: Path) -> None:
    """Write a settled round, one with fewer steps and an unsettled one, under a cap of 9."""
    with opened(path, 9.0, BY_RDP) as ledger:
        ledger.settle(ledger.reserve("run", 1, TEN), 10)
        ledger.settle(ledger.reserve("run", 2, TEN), 4)
        ledger.reserve("run", 3, TEN)


def test_verify_ledger_visits_every_entry(path: Path) -> None:
    assert verify_ledger(path) == 0
    history(path)
    seen: list[Entry] = []
    assert verify_ledger(path, lambda entries: (seen.append(e) or e for e in entries)) == 6
    assert [entry.kind for entry in seen] == [
        "terms",
        "reserve",
        "settle",
        "reserve",
        "settle",
        "reserve",
    ]


def forge(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change entries and rewrite all hashes and the head, so that only the content is wrong."""
    contents = [json.loads(text) for text in texts_of(path)]
    change(contents)
    texts = [json.dumps(c, sort_keys=True, separators=(",", ":")) for c in contents]
    rewrite(path, texts)
    before = "0" * 64
    for text in texts:
        before = hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
    head_of(path).write_text(json.dumps({"number": len(texts), "hash": before}))


@pytest.mark.parametrize(
    ("number", "lie", "said"),
    [
        (2, {"steps": 2}, "entry 2 says epsilon .*, expected"),
        (2, {"noise": 9.0}, "entry 2 says epsilon"),
        (2, {"rate": 0.01}, "entry 2 says epsilon"),
        (2, {"epsilon": 0.5}, r"entry 2 says epsilon 0.5, expected"),
        (2, {"epsilon": None}, "entry 2 says epsilon None"),
        (2, {"epsilon": None, "noise": 0.0}, "entry 2 says epsilon None"),
        (5, {"steps": 1}, "entry 5 says epsilon"),
        (5, {"epsilon": None}, "entry 5 says epsilon None"),
        (1, {"cap": 1.0}, r"entry 2 spends epsilon .*, above the cap 1"),
        (1, {"delta": 1e-5}, "entry 2 says epsilon"),
        (2, {"epsilon": "little"}, "entry 2 is not one .*'little'"),
        (2, {"steps": 0}, "entry 2 is not one .* reserves no steps"),
        (2, {"steps": 2.5}, "entry 2 is not one"),
        (2, {"rate": 1.5}, "entry 2 is not one"),
        (2, {"cohort": "south"}, "entry 2 is not one .* has no terms"),
        (3, {"steps": 11}, "entry 3 is not one .* more steps than were reserved"),
        (3, {"steps": 2.5}, "entry 3 is not one"),
        (3, {"steps": -1}, "entry 3 is not one"),
        (5, {"reservation": 2}, "entry 5 is not one .* settles a reservation twice"),
        (3, {"reservation": 6}, "entry 3 is not one"),
        (3, {"kind": "refund"}, "entry 3 is not one .*'refund'"),
        (1, {"units": 0}, "entry 1 is not one"),
        (1, {"delta": 0.5}, "entry 1 is not one"),
        (
            6,
            {"kind": "terms", "unit": "example", "units": 9, "delta": 1e-12, "cap": 9.0},
            "promise",
        ),
        (6, {"kind": "terms", "unit": "patient", "units": 9, "delta": 1e-5, "cap": 9.0}, "promise"),
    ],
)
def test_verify_finds_inconsistent_entries_with_valid_hashes(
    path: Path, number: int, lie: dict[str, Any], said: str
) -> None:
    history(path)
    forge(path, lambda contents: contents[number - 1].update(lie))
    with pytest.raises(LedgerTampered, match=said):
        verify_ledger(path)


def test_verify_accepts_rewritten_but_consistent_entries(path: Path) -> None:
    """Negative control: rewritten without a change, and with a slightly different epsilon."""
    history(path)
    forge(path, lambda contents: None)
    assert verify_ledger(path) == 6
    forge(path, lambda contents: contents[1].update(epsilon=contents[1]["epsilon"] * 1.005))
    assert verify_ledger(path) == 6


def train_with(privacy_declaration: PrivacyDeclaration, config: RunConfig) -> None:
    """Start a private round without network and images; all before the first step is real."""
    nothing: Any = None
    where = Round(1, 2, 0, "north")
    train_within_budget(
        nothing,
        nothing,
        where,
        privacy_declaration,
        config,
        policy=OPEN,
        device=torch.device("cpu"),
    )


def no_harm(path: Path, _: pytest.MonkeyPatch) -> None:
    pass


def locked(path: Path, patch: pytest.MonkeyPatch) -> sqlite3.Connection:
    patch.setattr(
        polyclinic.client.private_round, "Ledger", lambda *terms: Ledger(*terms, timeout_s=0.05)
    )
    held = sqlite3.connect(path, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    return held


def corrupt(path: Path, _: pytest.MonkeyPatch) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def of_a_newer_version(path: Path, _: pytest.MonkeyPatch) -> None:
    with database(path) as file:
        file.execute("PRAGMA user_version = 9")


def read_only(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "access", lambda place, _: Path(place) != path)


def tampered_with(path: Path, _: pytest.MonkeyPatch) -> None:
    forge(path, lambda contents: contents[1].update(steps=1))
    head_of(path).write_text(json.dumps({"number": 3, "hash": "1" * 64}))


def with_the_clock_back(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        polyclinic.client.ledger.hash_chain, "_now", lambda: datetime.now(UTC) - timedelta(hours=1)
    )


def on_a_full_disk(path: Path, _: pytest.MonkeyPatch) -> None:
    path.with_name(".ledger.db.head").symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (locked, "locked by another process for 0.05 s"),
        (corrupt, "damaged|malformed"),
        (of_a_newer_version, "newer Polyclinic"),
        (read_only, "read only"),
        (tampered_with, "was changed|not the one"),
        (with_the_clock_back, "the clock went back"),
        (on_a_full_disk, os.strerror(errno.ENOSPC)),
        (no_harm, None),
    ],
)
def test_unusable_ledger_prevents_training(
    path: Path,
    tiny: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path, pytest.MonkeyPatch], sqlite3.Connection | None],
    said: str | None,
) -> None:
    with opened(path, 9.0, BY_RDP, units=6) as ledger:
        ledger.settle(ledger.reserve("before", 1, TEN), 10)

    def training(*_: object, **__: object) -> None:
        raise ZeroDivisionError("it starts")

    monkeypatch.setattr(polyclinic.client.private_round, "train_one_round_privately", training)
    config = tiny(
        privacy__mode="dp-sgd",
        privacy__noise_multiplier=20.0,
        privacy__delta=BY_RDP,
        loss__class_weights="none",
        data__split="independent",
    )
    budget = BudgetConfig(epsilon=9.0, delta=BY_RDP, unit="patient")
    privacy_declaration = PrivacyDeclaration("run", "north", 12, 6, path, budget)
    entries = texts_of(path)
    held = harm(path, monkeypatch)
    if said is None:
        with pytest.raises(ZeroDivisionError):
            train_with(privacy_declaration, config)
        assert len(texts_of(path)) == len(entries) + 1
        return
    with pytest.raises(LedgerError, match=said):
        train_with(privacy_declaration, config)
    if held is not None:
        held.close()
    if harm is not corrupt:
        assert len(texts_of(path)) == len(entries)


def test_round_above_the_cap_is_declined_before_training(
    path: Path, tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        polyclinic.client.private_round, "train_one_round_privately", lambda *_, **__: 1 / 0
    )
    config = tiny(
        privacy__mode="dp-sgd",
        privacy__noise_multiplier=1.0,
        privacy__delta=1e-3,
        loss__class_weights="none",
        data__split="independent",
    )
    budget = BudgetConfig(epsilon=0.01, delta=1e-3, unit="patient")
    privacy_declaration = PrivacyDeclaration("run", "north", 12, 6, path, budget)
    with pytest.raises(Decline, match=r"cohort north: .* of 0.01 there is 0.01 left \(0 spent\)"):
        train_with(privacy_declaration, config)
    assert read_accounts(path)["north"].rounds == []
