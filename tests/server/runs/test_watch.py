"""Following a run: ``runs watch``, a command for each event, and the log as JSON."""

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
from polyclinic.configs.files import append_line
from polyclinic.configs.schema.rounds import RoundsConfig
from polyclinic.server.app import run
from polyclinic.server.rounds.errors import RunFailed
from polyclinic.server.runs.events import Events
from polyclinic.server.runs.folder import RunFolder
from polyclinic.server.runs.logs import JsonLines, log_to_stream
from polyclinic.server.runs.watch import longest_silence
from tests.memory_grid import MemoryGrid


def test_watch_of_a_finished_run_shows_all_rounds_and_exits_0(finished_run, cli) -> None:
    status, out, _ = cli("runs", "watch", finished_run)
    lines = out.splitlines()
    assert status == 0
    assert "round 1/2" in out
    assert "round 2/2" in out
    assert lines[-1].startswith("a-run completed after ")
    assert "best round" in lines[-1]


def test_watch_follows_a_running_run_to_its_end(tiny, grid, cli) -> None:
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


def test_watch_of_a_silent_run_exits_1(tiny, cli) -> None:
    folder = RunFolder.create(tiny())
    append_line(folder.progress, {"time": 0.0, "event": "phase", "round": 0} | PHASE)
    status, out, _ = cli("runs", "watch", folder.path, "--silence-s", "1")
    assert status == 1
    assert "no event from a-run for 1 s: it was interrupted" in out.splitlines()[-1]


PHASE = {"phase": "describe", "sites": 3}


def test_longest_silence_follows_from_the_deadlines() -> None:
    rounds = RoundsConfig(deadline_s=100, wait_for_sites_s=10)
    assert longest_silence(rounds) == 410


def test_watch_continues_past_the_end_of_a_resumed_run(tiny, cli) -> None:
    folder = RunFolder.create(tiny())
    end = {"time": 1.0, "event": "end", "status": "failed", "reason": "x", "seconds": 1.0}
    append_line(folder.progress, {**end, "best_round": None})
    append_line(folder.progress, {"time": 2.0, "event": "resumed", "round": 1})
    status, out, _ = cli("runs", "watch", folder.path, "--silence-s", "1")
    assert status == 1
    assert "no event from" in out


def collector(folder: Path, more: str = "") -> str:
    script = folder / "collect.py"
    script.write_text(
        f"import sys, pathlib\n{more}\n"
        f"pathlib.Path({str(folder / 'events')!r}).open('a').write(sys.stdin.read())\n"
    )
    return f"{sys.executable} {script}"


def test_on_event_command_receives_every_event_in_order(tiny, grid, tmp_path: Path) -> None:
    config = tiny(rounds__count=1, rounds__on_event=collector(tmp_path))
    folder = run(grid(config), config)
    told = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    written = [json.loads(line) for line in folder.progress.read_text().splitlines()]
    assert told == [{"run": "a-run", **event} for event in written]
    assert told[-1]["status"] == "completed"


def test_failing_on_event_command_is_logged_and_ignored(tiny, tmp_path: Path, caplog) -> None:
    folder = RunFolder.create(tiny())
    for command in (collector(tmp_path, "sys.exit('no such room')"), "/no/such/program"):
        with Events(folder, command) as events:
            events.notify({"event": "phase"})
    assert "exited with status 1: no such room" in caplog.text
    assert "/no/such/program" in caplog.text
    assert len(folder.progress.read_text().splitlines()) == 2


def test_slow_on_event_command_does_not_block(tiny, tmp_path: Path) -> None:
    command = collector(tmp_path, "import time; time.sleep(1)")
    with Events(RunFolder.create(tiny()), command) as events:
        began = time.monotonic()
        for _ in range(3):
            events.notify({"event": "phase"})
        assert time.monotonic() - began < 0.5
    assert len((tmp_path / "events").read_text().splitlines()) == 3  # closing waits for them


def test_invalid_on_event_command_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match=r"rounds.on-event: expected a command, got .*say 'half"):
        tiny(rounds__on_event="say 'half")


def test_log_format_json_writes_json_lines(capsys) -> None:
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
def test_watch_from_another_process_exits_0(finished_run: Path) -> None:
    program = Path(sys.executable).parent / "polyclinic"
    done = subprocess.run(
        [program, "runs", "watch", finished_run], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "completed" in done.stdout.splitlines()[-1]
