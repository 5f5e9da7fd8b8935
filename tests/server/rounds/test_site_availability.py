"""Sites that are late, disconnect, return under another node, join, or connect twice."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from polyclinic.configs import wire
from polyclinic.configs.run import RunConfig
from polyclinic.server.app import run
from polyclinic.server.rounds.errors import RunFailed, RunRefused
from polyclinic.server.rounds.federation import Federation
from polyclinic.server.rounds.replies import DeadlineExecutor, ReplyCollector
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.history import Line, read_history


def lines(folder: RunFolder, site: str) -> list[Line]:
    return [x for x in read_history(folder.history) if x.site == site and x.split == "val"]


def number_of(reply: Message) -> int:
    if not reply.has_content():
        return 0
    return int(reply.content.config_records[wire.SITE].get(wire.NUMBER, 0))


def events(folder: RunFolder, kind: str) -> list[dict]:
    found = [json.loads(line) for line in folder.progress.read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def absent_in(federation, rounds: set[int], site: int = 1) -> None:
    """Make a site lose its replies in some rounds."""

    def tamper(partition: int, reply: Message) -> Message | None:
        return None if partition == site and number_of(reply) in rounds else reply

    federation.tamper = tamper


def test_late_site_is_reported_and_joins_the_next_round(tiny, grid) -> None:
    config = tiny(rounds__count=2, rounds__min_sites="2", rounds__deadline_s=2)
    federation = grid(config)
    absent_in(federation, {1})
    folder = run(federation, config)
    first, second = lines(folder, "site-2")
    assert first.late == dict.fromkeys(
        ("train", "evaluate"), "no answer in 2 s (rounds.deadline-s)"
    )
    assert first.metrics is None
    assert (second.lost, second.asked) == ({}, ("train", "evaluate"))
    assert second.train is not None
    (settled,) = (e for e in events(folder, "settled") if (e["round"], e["phase"]) == (1, "train"))
    assert settled["answered"] == ["site-1", "site-3"]
    assert list(settled["late"]) == ["site-2"]


def test_repeatedly_failing_site_is_suspended_and_retried(tiny, grid) -> None:
    config = tiny(
        rounds__count=4,
        rounds__min_sites="2",
        rounds__deadline_s=1,
        rounds__suspend_after=2,
        rounds__suspend_rounds=1,
    )
    federation = grid(config)
    absent_in(federation, {1})
    folder = run(federation, config)
    one, two, three, four = lines(folder, "site-2")
    assert set(one.late) == {"train", "evaluate"}  # two consecutive failures
    assert two.asked == ()
    assert "suspended after 2 consecutive failures, until round 3" in two.left_out["train"]
    assert three.train is not None
    assert four.train is not None
    assert [(e["site"], e["until"]) for e in events(folder, "suspended")] == [("site-2", 3)]


def test_run_without_quorum_fails_and_lists_missing_sites(tiny, grid) -> None:
    config = tiny(rounds__count=3, rounds__min_sites="67%", rounds__deadline_s=1)
    federation = grid(config)

    def two_vanish(partition: int, reply: Message) -> Message | None:
        return None if partition > 0 and number_of(reply) == 2 else reply

    federation.tamper = two_vanish
    said = (
        r"round 2, train: 1 of 3 sites answered, 3 are needed \(rounds.min-sites\): "
        r"site-2: no answer in 1 s.*; site-3: no answer in 1 s"
    )
    with pytest.raises(RunFailed, match=said):
        run(federation, config)
    folder = RunFolder.of("a-run", config.run.output_dir)
    assert folder.checkpoints() == [1]
    assert json.loads(folder.outcome.read_text())["status"] == "failed"


def test_site_returning_under_another_node_is_recognised(tiny, grid) -> None:
    config = tiny(rounds__count=3, rounds__min_sites="2", rounds__wait_for_sites_s=1)
    federation = grid(config)
    federation.node_config = lambda partition: {"partition-id": partition, "num-partitions": 3}

    def restarted(partition: int, reply: Message) -> Message:
        if partition == 0 and reply.metadata.message_type == wire.TRAIN:
            if number_of(reply) == 1:
                federation.nodes.pop(1001, None)
            if number_of(reply) == 2:
                federation.nodes[2001] = 1
        return reply

    federation.tamper = restarted
    folder = run(federation, config)
    one, two, three = lines(folder, "site-2")
    assert one.left_out or one.lost
    assert two.left_out["train"] == "not connected"
    assert three.train is not None
    (back,) = events(folder, "joined")
    assert (back["site"], back["back"]) == ("site-2", True)
    assert {line.site for line in read_history(folder.history)} == {
        *("site-1", "site-2", "site-3", "pooled")
    }


def test_site_connecting_during_a_run_joins(tiny, grid) -> None:
    config = tiny(rounds__count=3, rounds__min_sites="2", rounds__wait_for_sites_s=1)
    federation = grid(config)
    del federation.nodes[1002]

    def node_config(partition: int) -> dict[str, object]:
        return {"partition-id": partition, "num-partitions": 3}

    federation.node_config = node_config

    def joins(partition: int, reply: Message) -> Message:
        if reply.metadata.message_type == wire.EVALUATE:
            federation.nodes[1002] = 2
        return reply

    federation.tamper = joins
    folder = run(federation, config)
    assert lines(folder, "site-3")[-1].train is not None
    assert [e["site"] for e in events(folder, "joined")] == ["site-3"]
    closed = tiny(
        run__name="closed",
        rounds__count=2,
        rounds__min_sites="2",
        central__mode="fixed",
    )
    federation = grid(closed)
    del federation.nodes[1002]
    federation.node_config, federation.tamper = node_config, joins
    assert not lines(run(federation, closed), "site-3")


def test_second_node_of_a_site_is_reported_and_unused(tiny, grid, caplog) -> None:
    config = tiny(rounds__count=1, rounds__min_sites="3")
    federation = grid(config)
    federation.node_config = lambda partition: {"partition-id": partition, "num-partitions": 3}
    federation.nodes[1003] = 1
    folder = run(federation, config)
    assert "site 'site-2' is already connected as node 1001; stop one of the two" in caplog.text
    trains = [m for m in federation.sent if m.metadata.message_type == wire.TRAIN]
    assert {m.metadata.dst_node_id for m in trains} == {1000, 1001, 1002}
    assert "1003" in next(iter(events(folder, "sites")[0]["failed"]))


def test_site_with_a_mismatched_name_is_excluded(tiny, grid, caplog) -> None:
    """A node's site is the one its key is registered for, whatever name the node gives."""
    config = tiny(rounds__count=1, rounds__min_sites="2")
    federation = grid(config)
    federation.names = {1000: "site-1", 1001: "site-2", 1002: "site-0"}
    folder = run(federation, config)
    assert (
        "its key is registered for site 'site-0', but its site.yaml names 'site-3'" in caplog.text
    )
    assert "1002" in next(iter(events(folder, "sites")[0]["failed"]))
    trains = [m for m in federation.sent if m.metadata.message_type == wire.TRAIN]
    assert {m.metadata.dst_node_id for m in trains} == {1000, 1001}


def test_duplicate_and_unexpected_replies_are_dropped(tiny, grid, caplog) -> None:
    config = tiny(rounds__count=1)
    federation = grid(config)
    pull: Callable = federation.pull_messages
    earlier: list[Message] = []

    def with_more(ids: list[str]) -> list[Message]:
        replies = pull(ids)
        again = list(earlier)
        earlier.extend(replies)
        return [*again, *replies]

    federation.pull_messages = with_more
    run(federation, config)
    assert "dropped an unexpected reply" in caplog.text


@pytest.mark.parametrize(
    ("code", "reason", "outcome"),
    [
        (ErrorCode.MESSAGE_UNAVAILABLE, "gone", "late"),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "gone", "late"),
        (ErrorCode.NODE_UNAVAILABLE, "gone", "failed"),
        (ErrorCode.INVALID_FAB, "gone", "failed"),
        (ErrorCode.INVALID_FAB, f"{wire.UNAPPROVED}: 1234", "declined"),
    ],
)
def test_flower_error_codes_map_to_outcomes(
    tiny, grid, code: int, reason: str, outcome: str
) -> None:
    config = tiny(rounds__count=1, rounds__min_sites="2")
    federation = grid(config)

    def unavailable(partition: int, reply: Message) -> Message:
        if partition == 1 and number_of(reply) == 1:
            error = Message(Error(code=code, reason=reason), reply_to=federation.sent[-1])
            return error
        return reply

    federation.tamper = unavailable
    (line,) = lines(run(federation, config), "site-2")
    assert set(getattr(line, outcome)) == {"train", "evaluate"}


def test_declining_site_is_asked_again_and_not_suspended(tiny, grid) -> None:
    config = tiny(rounds__count=3, rounds__min_sites="2", rounds__suspend_after=1)
    federation = grid(config)

    def declines(partition: int, reply: Message) -> Message:
        if partition == 1 and reply.metadata.message_type == wire.TRAIN:
            about = ConfigRecord(
                {
                    **reply.content.config_records[wire.SITE],
                    wire.DECLINED: "its budget is spent",
                }
            )
            reply.content = RecordDict({wire.SITE: about, wire.SUMS: MetricRecord()})
        return reply

    federation.tamper = declines
    found = lines(run(federation, config), "site-2")
    assert [line.declined for line in found] == [{"train": "its budget is spent"}] * 3
    assert all(line.asked == ("train", "evaluate") for line in found)


def test_sampled_sites_train_and_all_sites_evaluate(tiny, grid) -> None:
    config = tiny(rounds__count=4, rounds__fraction=0.5, rounds__min_sites="100%")
    folder = run(grid(config), config)
    for number in range(1, 5):
        found = [x for x in read_history(folder.history) if x.round == number and x.split == "val"]
        sites = [x for x in found if x.site != "pooled"]
        assert sum(x.train is not None for x in sites) == 2
        assert all(x.metrics is not None for x in sites)
        (out,) = (x for x in sites if x.train is None)
        assert out.left_out == {"train": "not drawn (rounds.fraction)"}
    other = tiny(run__name="again", rounds__count=4, rounds__fraction=0.5, rounds__min_sites="100%")
    again = run(grid(other), other)
    assert [(x.round, x.site) for x in read_history(again.history) if x.train is not None] == [
        (x.round, x.site) for x in read_history(folder.history) if x.train is not None
    ]


def test_min_sites_above_the_sample_size_is_refused(tiny, grid) -> None:
    config = tiny(rounds__fraction=0.3, rounds__min_sites="2")
    with pytest.raises(RunRefused, match=r"rounds.min-sites: expected at most 1, the number that"):
        run(grid(config), config)


def test_incomplete_reply_does_not_block_others(tiny, grid, monkeypatch) -> None:
    """A site vanished while sending; Flower waits for the rest, the round only for its deadline."""
    import threading

    monkeypatch.setattr("polyclinic.server.rounds.replies.PULL_S", 0.2)
    config = tiny(rounds__count=1, rounds__min_sites="2", rounds__deadline_s=10.0)
    federation = grid(config)
    pull: Callable = federation.pull_messages

    def waits_for_the_rest(ids: list[str]) -> list[Message]:
        found = pull(ids)
        for reply in found:
            if reply.metadata.message_type == wire.TRAIN and reply.metadata.src_node_id == 1000:
                threading.Event().wait()
        return found

    federation.pull_messages = waits_for_the_rest
    kept: list[int] = []
    finish_phase = Federation.finish_phase

    def settle_and_count(self: Federation, *given) -> None:
        kept.append(len(self._pulls._pending))
        finish_phase(self, *given)

    monkeypatch.setattr(Federation, "finish_phase", settle_and_count)
    folder = run(federation, config)
    assert set(kept) == {0}  # late replies are not kept
    assert lines(folder, "site-1")[-1].late["train"] == "no answer in 10 s (rounds.deadline-s)"
    assert lines(folder, "site-2")[-1].train is not None
    assert lines(folder, "site-1")[-1].metrics is not None  # it answers the evaluation


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://superlink/v1/runtime/pull-messages")
    return httpx.HTTPStatusError(str(status), request=request, response=httpx.Response(status))


@pytest.mark.parametrize("call", ["get_nodes", "push_messages", "pull_messages"])
def test_superlink_error_is_retried(tiny, grid, monkeypatch, call: str) -> None:
    """This happens when a huge reply locks the SuperLink's database for too long."""
    monkeypatch.setattr("polyclinic.server.rounds.replies.AGAIN_S", 0.01)
    federation = grid(tiny(rounds__count=1))
    calls = 0
    ask: Callable = getattr(federation, call)

    def ask_in_vain(*given) -> object:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise answer(500)
        return ask(*given)

    setattr(federation, call, ask_in_vain)
    folder = run(federation, tiny(rounds__count=1))
    assert all(line.lost == {} for line in lines(folder, "site-1"))
    assert calls > 3


def test_permanent_superlink_failure_ends_the_run(tiny, grid, monkeypatch) -> None:
    monkeypatch.setattr("polyclinic.server.rounds.replies.AGAIN_S", 0.01)
    bounded = DeadlineExecutor(0.2, "the SuperLink")

    def ask(status: int) -> object:
        raise answer(status)

    with pytest.raises(RunFailed, match=r"the SuperLink could not answer in 0\.2 s: 503"):
        bounded(lambda: ask(503))
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        bounded(lambda: ask(401))
    federation = grid(tiny(rounds__count=1))
    federation.pull_messages = lambda ids: ask(401)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        run(federation, tiny(rounds__count=1))


def test_undecodable_reply_is_refused_and_others_are_used(tiny, grid) -> None:
    """A site may send arbitrary bytes that Flower cannot decode as a message."""
    config = tiny(rounds__count=1, rounds__min_sites="2")
    federation = grid(config)
    pull: Callable = federation.pull_messages

    def unpacks(ids: list[str]) -> list[Message]:
        found = pull(ids)
        for reply in found:
            if reply.metadata.message_type == wire.TRAIN and reply.metadata.src_node_id == 1000:
                raise ValueError("Expected 8 children")
        return found

    federation.pull_messages = unpacks
    folder = run(federation, config)
    (line,) = [x for x in lines(folder, "site-1") if x.split == "val"]
    assert line.refused == {"train": "expected a message, ValueError: Expected 8 children"}
    assert lines(folder, "site-2")[-1].train is not None


def test_pulling_replies_is_bounded_with_many_stuck_ones(monkeypatch) -> None:
    import threading

    monkeypatch.setattr("polyclinic.server.rounds.replies.PULL_S", 0.2)
    asked: list[str] = []

    class Gone:
        def pull_messages(self, ids: list[str]) -> list[Message]:
            asked.extend(ids)
            if ids != ["here"]:
                threading.Event().wait()
            return []

    pulls = ReplyCollector(Gone())  # type: ignore[arg-type]
    ids = [*map(str, range(100)), "here"]
    for look in (1, 2, 3):
        assert list(pulls.take(ids)) == []
        assert asked == ids[:look]
    assert list(pulls.take(ids)) == []
    assert asked == ids[:3]  # a limited number at a time, as each may hold a whole network
    monkeypatch.setattr("polyclinic.server.rounds.replies.STUCK_S", 0.0)
    assert list(pulls.take(["0", "1", "2", "here"])) == []
    assert asked[-1] == "here"  # stuck pulls before it no longer block it


def test_deadline_executor_stops_waiting_at_the_deadline() -> None:
    import threading

    bounded = DeadlineExecutor(0.2, "the SuperLink")
    assert bounded(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        bounded(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    with pytest.raises(RunFailed, match="the SuperLink did not answer in"):
        bounded(threading.Event().wait)


def test_resumed_run_with_central_privacy_admits_no_new_site(tiny, grid, caplog) -> None:
    """Noise and denominator count the sites that are connected when the run is resumed."""
    config = tiny(rounds__count=1, rounds__min_sites="1", central__mode="fixed")
    run(grid(config), config)
    flat = {
        "run.resume": "a-run",
        "run.output-dir": config.run.output_dir,
        "rounds.count": 4,
        "rounds.wait-for-sites-s": 1.0,
    }
    resumed = RunConfig.from_flat(flat)
    federation = grid(resumed)
    federation.node_config = lambda partition: {"partition-id": partition, "num-partitions": 3}
    del federation.nodes[1002]

    def comes_back(_partition: int, reply: Message) -> Message:
        if number_of(reply) == 2:
            federation.nodes[1002] = 2
        return reply

    federation.tamper = comes_back
    folder = run(federation, resumed)
    releases = json.loads(folder.central.read_text())["releases"]
    assert [release["sites"] for release in releases] == [3, 2, 2, 2]
    assert all(line.train is None for line in lines(folder, "site-3") if line.round > 1)
    assert "site 'site-3' was not connected when the run started" in caplog.text
