"""The roster of sites, sampling of sites, and checks of their updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from polyclinic.configs import wire
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.packing import Packed
from polyclinic.server.aggregation.averaging import Contribution
from polyclinic.server.rounds.messages import ReplyError
from polyclinic.server.rounds.roster import SiteRoster, sample
from polyclinic.server.rounds.update_checks import (
    HELD,
    UpdateFilter,
    check_counts,
    check_norm,
    update_norm,
)
from polyclinic.server.runs.reports import SiteReport, TrainReport

KEY = "encoder/float32"
SENT: Packed = {KEY: np.zeros(4, np.float32), "encoder/int64": np.array([7])}
REPORT = TrainReport(steps=10, seconds=1.0, loss_segmentation=0.5, loss_classification=0.5)


def roster(after: int = 2, rounds: int = 2) -> SiteRoster:
    made = SiteRoster(after, rounds)
    for name in ("a", "b", "c"):
        made.add(name)
    return made


def test_site_with_consecutive_failures_is_suspended_and_retried() -> None:
    sites = roster(after=2, rounds=2)
    assert not sites.failed(1, "b")
    assert sites.eligible(2) == ["a", "b", "c"]
    assert sites.failed(2, "b")
    assert sites.eligible(3) == sites.eligible(4) == ["a", "c"]
    assert sites.suspended(3) == {"b": "suspended after 2 consecutive failures, until round 5"}
    assert sites.eligible(5) == ["a", "b", "c"]
    assert sites.failed(5, "b")  # one failed retry suspends it again
    assert sites.eligible(7) == ["a", "c"]
    sites.answered("b")
    assert not sites.failed(8, "b")


def test_answer_resets_the_failure_count() -> None:
    sites = roster(after=2)
    sites.failed(1, "a")
    sites.answered("a")
    assert not sites.failed(2, "a")
    never = roster(after=0)
    assert not any(never.failed(number, "a") for number in range(1, 20))


def test_roster_is_restored_from_its_state() -> None:
    sites = roster()
    sites.failed(1, "a")
    sites.moved("b", 0.25, 9)
    other = SiteRoster(2, 2)
    other.restore(sites.state())
    assert other.failed(2, "a")
    assert other.reference_updates() == [(0.25, 9)]


def test_sample_depends_on_seed_and_round_and_covers_all_sites() -> None:
    names = [f"site-{i}" for i in range(10)]
    drawn = [sample(names, 0.25, seed=3, number=number) for number in range(1, 40)]
    assert all(len(set(of_round)) == 3 for of_round in drawn)  # a quarter of ten, rounded up
    assert drawn == [sample(names[::-1], 0.25, seed=3, number=number) for number in range(1, 40)]
    assert drawn != [sample(names, 0.25, seed=4, number=number) for number in range(1, 40)]
    assert {name for of_round in drawn for name in of_round} == set(names)
    assert sample(names, 1.0, 0, 1) == names
    assert sample([], 0.5, 0, 1) == []


def contribution(site: str, step: float, examples: int = 10) -> Contribution:
    weights = {KEY: np.full(4, step, np.float32), "encoder/int64": np.array([9])}
    counts = {"encoder": examples, "segmentation": examples, "classification": examples}
    return Contribution(site, weights, counts)


def test_update_norm_uses_floating_point_changes_only() -> None:
    assert update_norm(contribution("a", 0.5), SENT) == pytest.approx(1.0)


def test_check_norm_refuses_outliers_relative_to_steps() -> None:
    others = [(1.0, 10), (1.2, 10), (0.8, 10)]
    check_norm((9.0, 10), others, 10)
    with pytest.raises(ReplyError, match=r"at most 10 \(10 times the sites' median.*got 11"):
        check_norm((11.0, 10), others, 10)
    check_norm((11.0, 100), others, 10)
    check_norm((11.0, 10), others, 0)
    check_norm((11.0, 10), [], 10)


def taken(
    steps: list[float], reference: list[tuple[float, int]]
) -> tuple[list[str], dict[str, str]]:
    accepted: list[str] = []
    updates = UpdateFilter(SENT, reference, 10, lambda c, report, norm: accepted.append(c.site))
    refused: dict[str, str] = {}
    for i, step in enumerate(steps):
        try:
            refused |= updates.take(contribution(f"site-{i}", step), REPORT)
        except ReplyError as error:
            refused[f"site-{i}"] = str(error)
    return accepted, refused | updates.close()


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_first_round_updates_are_compared_with_each_other(bad: int) -> None:
    steps = [0.01] * 4
    steps[bad] = 50.0
    accepted, refused = taken(steps, [])
    assert list(refused) == [f"site-{bad}"]
    assert len(accepted) == 3


def test_later_updates_are_checked_immediately() -> None:
    reference = [(0.02, 10), (0.03, 10), (0.02, 10)]
    accepted, refused = taken([50.0, 0.01, 0.02], reference)
    assert (accepted, list(refused)) == (["site-1", "site-2"], ["site-0"])


def test_update_filter_holds_a_bounded_number_of_updates() -> None:
    held: list[int] = []
    accepted: list[str] = []
    updates = UpdateFilter(SENT, [], 10, lambda c, report, norm: accepted.append(c.site))
    refused: dict[str, str] = {}
    for i in range(50):
        try:
            refused |= updates.take(
                contribution(f"site-{i}", 50.0 if i in (2, 30) else 0.01), REPORT
            )
        except ReplyError as error:
            refused[f"site-{i}"] = str(error)
        held.append(len(updates.held))
    assert max(held) < HELD
    assert not updates.close()
    assert set(refused) == {"site-2", "site-30"}
    assert len(accepted) == 48


def test_two_differing_sites_are_both_accepted() -> None:
    accepted, refused = taken([0.01, 50.0], [])
    assert (len(accepted), refused) == (2, {})


def test_check_counts_compares_with_the_site_description() -> None:
    splits = dict.fromkeys(wire.SPLITS, 10)
    described = SiteReport("a", splits, {}, splits, splits, (), "", "cpu", {})
    train = TrainConfig(batch_size=5, local_epochs=2)
    check_counts(contribution("a", 0.1, 10), replace(REPORT, steps=4), described, train)
    check_counts(contribution("a", 0.1, 15), replace(REPORT, steps=6), described, train)
    with pytest.raises(ReplyError, match="about the 10 training images"):
        check_counts(contribution("a", 0.1, 2000), REPORT, described, train)
    with pytest.raises(ReplyError, match="about 4 steps from 10 images, got 10"):
        check_counts(contribution("a", 0.1, 10), REPORT, described, train)
