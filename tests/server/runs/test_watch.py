"""Whoever wants to know how a run goes: watching it, a command for each event, the log as JSON."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.rounds import RoundsConfig
from polyclinic.server.app import run
from polyclinic.server.rounds.federation import RunFailed
from polyclinic.server.runs.events import Events
from polyclinic.server.runs.folder import RunFolder, append_line
from polyclinic.server.runs.logs import JsonLines, log_to_stream
from polyclinic.server.runs.watch import longest_silence
from tests.memory_grid import MemoryGrid


def test_a_finished_run_is_shown_from_its_beginning_and_ends_with_0(finished_run, cli) -> None:
    status, out, _ = cli("runs", "watch", finished_run)
    lines = out.splitlines()
    assert status == 0
    assert "round 1/2" in out
    assert "round 2/2" in out
    assert lines[-1].startswith("a-run completed after ")
    assert "best round" in lines[-1]


def test_a_run_that_goes_on_is_followed_to_its_end(tiny, grid, cli) -> None:
    config = tiny(rounds__count=2, rounds__min_sites="3", rounds__deadline_s=3)
    federation: MemoryGrid = grid(config)
    trained = 0

    def lost_in_round_2(partition: int, reply):
        nonlocal trained
        trained += reply.metadata.message_type == "train"
        return None if trained > 3 else reply

    federation.tamper = lost_in_round_2

    def work() -> None:
        with pytest.raises(RunFailed):
            run(federation, config)

    thread = threading.Thread(target=work)
    thread.start()
    folder = RunFolder(Path(config.run.output_dir) / "a-run")
    while not folder.config.exists():
        time.sleep(0.05)
    status, out, _ = cli("runs", "watch", folder.path)
    thread.join()
    assert status == 1
    assert "site-1 is late: no answer in 3 s" in out
    assert "failed after" in out.splitlines()[-1]
    assert "0 of 3 sites answered" in out.splitlines()[-1]


def test_a_run_that_is_no_longer_heard_of_is_not_watched_for_ever(tiny, cli) -> None:
    folder = RunFolder.create(tiny())
    append_line(folder.progress, {"time": 0.0, "event": "phase", "round": 0} | PHASE)
    status, out, _ = cli("runs", "watch", folder.path, "--silence-s", "1")
    assert status == 1
    assert "nothing was heard of a-run for 1 s: it was interrupted" in out.splitlines()[-1]


PHASE = {"phase": "describe", "sites": 3}


def test_the_silence_of_a_run_is_bounded_by_its_deadlines() -> None:
    rounds = RoundsConfig(deadline_s=100, wait_for_sites_s=10)
    assert longest_silence(rounds) == 410


def test_the_end_before_a_resumption_is_not_the_end(tiny, cli) -> None:
    folder = RunFolder.create(tiny())
    end = {"time": 1.0, "event": "end", "status": "failed", "reason": "x", "seconds": 1.0}
    append_line(folder.progress, {**end, "best-round": None})
    append_line(folder.progress, {"time": 2.0, "event": "resumed", "round": 1})
    status, out, _ = cli("runs", "watch", folder.path, "--silence-s", "1")
    assert status == 1
    assert "nothing was heard" in out


def collector(folder: Path, more: str = "") -> str:
    script = folder / "collect.py"
    script.write_text(
        f"import sys, pathlib\n{more}\n"
        f"pathlib.Path({str(folder / 'events')!r}).open('a').write(sys.stdin.read())\n"
    )
    return f"{sys.executable} {script}"


def test_a_command_is_given_every_event_in_order(tiny, grid, tmp_path: Path) -> None:
    config = tiny(rounds__count=1, rounds__on_event=collector(tmp_path))
    folder = run(grid(config), config)
    told = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    written = [json.loads(line) for line in folder.progress.read_text().splitlines()]
    assert told == [{"run": "a-run", **event} for event in written]
    assert told[-1]["status"] == "completed"


def test_a_command_that_fails_is_told_and_ends_nothing(tiny, tmp_path: Path, caplog) -> None:
    folder = RunFolder.create(tiny())
    for command in (collector(tmp_path, "sys.exit('no such room')"), "/no/such/program"):
        with Events(folder, command) as events:
            events.notify({"event": "phase"})
    assert "ended with status 1: no such room" in caplog.text
    assert "/no/such/program" in caplog.text
    assert len(folder.progress.read_text().splitlines()) == 2


def test_a_slow_command_delays_no_round(tiny, tmp_path: Path) -> None:
    command = collector(tmp_path, "import time; time.sleep(1)")
    with Events(RunFolder.create(tiny()), command) as events:
        began = time.monotonic()
        for _ in range(3):
            events.notify({"event": "phase"})
        assert time.monotonic() - began < 0.5
    assert len((tmp_path / "events").read_text().splitlines()) == 3  # the end waits for them


def test_a_command_that_is_none_is_refused_before_anything_is_made(tiny) -> None:
    with pytest.raises(ConfigError, match=r"rounds.on-event: expected a command, got .*say 'half"):
        tiny(rounds__on_event="say 'half")


def test_log_lines_are_json_on_request(capsys) -> None:
    log_to_stream("json")
    handler = next(h for h in logging.getLogger("polyclinic.server").handlers if h.name)
    assert isinstance(handler.formatter, JsonLines)
    record = logging.LogRecord(
        "polyclinic.server.rounds.loop", logging.WARNING, "", 1, "%s is late", ("x",), None
    )
    line = json.loads(handler.formatter.format(record))
    assert (line["level"], line["module"], line["message"]) == (
        *("warning", "polyclinic.server.rounds.loop"),
        "x is late",
    )
    log_to_stream("text")
    assert handler.formatter.format(record) == "WARNING: x is late"


@pytest.mark.slow
def test_watching_from_another_process(finished_run: Path) -> None:
    program = Path(sys.executable).parent / "polyclinic"
    done = subprocess.run(
        [program, "runs", "watch", finished_run], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "completed" in done.stdout.splitlines()[-1]
