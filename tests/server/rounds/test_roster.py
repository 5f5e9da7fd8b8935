"""The coordinator's book of sites, who is drawn, and what an update is judged by."""

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


def test_a_site_that_fails_in_a_row_rests_and_is_tried_again() -> None:
    sites = roster(after=2, rounds=2)
    assert not sites.failed(1, "b")
    assert sites.eligible(2) == ["a", "b", "c"]
    assert sites.failed(2, "b")
    assert sites.eligible(3) == sites.eligible(4) == ["a", "c"]
    assert sites.suspended(3) == {"b": "set aside after 2 failures in a row, until round 5"}
    assert sites.eligible(5) == ["a", "b", "c"]
    assert sites.failed(5, "b")  # tried once, and it rests again
    assert sites.eligible(7) == ["a", "c"]
    sites.answered("b")
    assert not sites.failed(8, "b")


def test_an_answer_in_between_begins_the_count_anew() -> None:
    sites = roster(after=2)
    sites.failed(1, "a")
    sites.answered("a")
    assert not sites.failed(2, "a")
    never = roster(after=0)
    assert not any(never.failed(number, "a") for number in range(1, 20))


def test_a_book_goes_on_from_its_state() -> None:
    sites = roster()
    sites.failed(1, "a")
    sites.moved("b", 0.25, 9)
    other = SiteRoster(2, 2)
    other.restore(sites.state())
    assert other.failed(2, "a")
    assert other.reference_updates() == [(0.25, 9)]


def test_sites_are_drawn_by_seed_and_round_and_all_come_to_their_turn() -> None:
    names = [f"site-{i}" for i in range(10)]
    drawn = [sample(names, 0.25, seed=3, number=number) for number in range(1, 40)]
    assert all(len(set(of_round)) == 3 for of_round in drawn)  # a fourth of ten, rounded up
    assert drawn == [sample(names[::-1], 0.25, seed=3, number=number) for number in range(1, 40)]
    assert drawn != [sample(names, 0.25, seed=4, number=number) for number in range(1, 40)]
    assert {name for of_round in drawn for name in of_round} == set(names)
    assert sample(names, 1.0, 0, 1) == names
    assert sample([], 0.5, 0, 1) == []


def contribution(site: str, step: float, examples: int = 10) -> Contribution:
    weights = {KEY: np.full(4, step, np.float32), "encoder/int64": np.array([9])}
    counts = {"encoder": examples, "segmentation": examples, "classification": examples}
    return Contribution(site, weights, counts)


def test_a_norm_is_of_what_was_changed_in_floating_point_weights() -> None:
    assert update_norm(contribution("a", 0.5), SENT) == pytest.approx(1.0)


def test_a_norm_far_from_the_others_is_refused_unless_there_were_more_steps() -> None:
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
def test_in_the_first_round_contributions_are_judged_by_each_other(bad: int) -> None:
    steps = [0.01] * 4
    steps[bad] = 50.0
    accepted, refused = taken(steps, [])
    assert list(refused) == [f"site-{bad}"]
    assert len(accepted) == 3


def test_later_each_is_judged_at_once_and_none_is_held() -> None:
    reference = [(0.02, 10), (0.03, 10), (0.02, 10)]
    accepted, refused = taken([50.0, 0.01, 0.02], reference)
    assert (accepted, list(refused)) == (["site-1", "site-2"], ["site-0"])


def test_no_more_than_a_few_are_held_however_many_sites_there_are() -> None:
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


def test_of_two_sites_nobody_can_say_which_is_wrong() -> None:
    accepted, refused = taken([0.01, 50.0], [])
    assert (len(accepted), refused) == (2, {})


def test_counts_are_held_against_what_the_site_said_of_itself() -> None:
    splits = dict.fromkeys(wire.SPLITS, 10)
    described = SiteReport("a", splits, {}, splits, splits, (), "", "cpu", {})
    train = TrainConfig(batch_size=5, local_epochs=2)
    check_counts(contribution("a", 0.1, 10), replace(REPORT, steps=4), described, train)
    check_counts(contribution("a", 0.1, 15), replace(REPORT, steps=6), described, train)
    with pytest.raises(ReplyError, match="about the 10 training images"):
        check_counts(contribution("a", 0.1, 2000), REPORT, described, train)
    with pytest.raises(ReplyError, match="about 4 steps from 10 images, got 10"):
        check_counts(contribution("a", 0.1, 10), REPORT, described, train)
