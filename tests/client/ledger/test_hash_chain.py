"""The append-only file of a ledger: durability, tamper detection, and files it refuses to open."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import polyclinic.client.ledger.hash_chain
from polyclinic.client.ledger.hash_chain import (
    SCHEMA,
    Entry,
    HashChain,
    Head,
    LedgerError,
    LedgerTampered,
)
from tests import ROOT
from tests.factories import database, head_of, rewrite, texts_of, without_triggers

NOBODY = 65534


def append(path: Path, *kinds: str) -> None:
    """Append one entry per turn, as training does."""
    with HashChain(path) as chain:
        for kind in kinds:
            with chain.transaction():
                chain.append(kind, note=f"of kind {kind}")


def append_in(chain: HashChain, *kinds: str) -> None:
    """Append all entries in one turn."""
    with chain.transaction():
        for kind in kinds:
            chain.append(kind)


def kinds(path: Path) -> list[str]:
    with HashChain(path, read_only=True) as chain:
        return [entry.kind for entry in chain.entries]


def test_entries_persist_after_reopening(path: Path) -> None:
    started = datetime.now(UTC)
    with HashChain(path) as chain:
        with chain.transaction():
            first = chain.append("terms", cap=8.0, unit="patient")
            second = chain.append("reserve", steps=3)
        assert chain.entries == (first, second)
        assert chain.head == Head(2, second.hash)
    with HashChain(path) as again:
        assert again.entries == (first, second)
    assert dict(first.content) == {
        "number": 1,
        "kind": "terms",
        "time": first.time.isoformat(),
        "cap": 8.0,
        "unit": "patient",
    }
    assert started <= first.time <= second.time <= datetime.now(UTC)


def test_commit_is_synchronised_to_disk(path: Path) -> None:
    """Check SQLite's settings for durability, since a test cannot cut the power."""
    with HashChain(path) as chain:
        assert chain._pragma("synchronous") == 2  # FULL: the log is synchronised at each commit
        assert chain._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_hash_covers_entry_and_previous_hash(path: Path) -> None:
    append(path, "one", "two", "three")
    before = "0" * 64
    with database(path) as opened:
        rows = opened.execute("SELECT content, hash FROM entries ORDER BY number").fetchall()
    for text, found in rows:
        assert found == hashlib.sha256(before.encode() + b"\n" + text.encode()).hexdigest()
        before = found
    assert json.loads(head_of(path).read_text()) == {"number": 3, "hash": before}


def test_failed_turn_writes_nothing(path: Path) -> None:
    append(path, "one")
    noted = head_of(path).read_bytes()
    with HashChain(path) as chain:
        before = chain.entries
        with pytest.raises(TypeError, match="JSON"):
            append_in(chain, "two", b"three")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="JSON"), chain.transaction():
            chain.append("two", epsilon=float("nan"))
        assert chain.entries == before
        assert kinds(path) == ["one"]
        assert head_of(path).read_bytes() == noted
        with chain.transaction():
            chain.append("three")
    assert kinds(path) == ["one", "three"]


def test_append_outside_a_turn_raises_runtime_error(path: Path) -> None:
    with HashChain(path) as chain, pytest.raises(RuntimeError, match=r"within turn\(\)"):
        chain.append("one")
    assert kinds(path) == []


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE entries SET content = '{}'", "never changed"),
        ("DELETE FROM entries WHERE number = 2", "never deleted"),
        ("INSERT INTO entries VALUES (4, '{}', '')", "numbered one by one"),
        ("INSERT OR REPLACE INTO entries VALUES (1, '{}', '')", "numbered one by one"),
    ],
)
def test_sqlite_triggers_refuse_update_delete_and_gaps(
    path: Path, statement: str, said: str
) -> None:
    append(path, "one", "two")
    with database(path) as opened, pytest.raises(sqlite3.IntegrityError, match=said):
        opened.execute(statement)
    assert kinds(path) == ["one", "two"]


def a_word_changed(path: Path) -> None:
    with without_triggers(path) as opened:
        opened.execute("UPDATE entries SET content = replace(content, 'of', 'or') WHERE number = 2")


def not_even_text(path: Path) -> None:
    with without_triggers(path) as opened:
        opened.execute("UPDATE entries SET content = CAST(x'ff00ff' AS TEXT) WHERE number = 2")


def a_hash_changed(path: Path) -> None:
    with without_triggers(path) as opened:
        opened.execute("UPDATE entries SET hash = lower(hex(randomblob(32))) WHERE number = 2")


def one_taken_out(path: Path) -> None:
    with without_triggers(path) as opened:
        opened.execute("DELETE FROM entries WHERE number = 2")


def two_swapped(path: Path) -> None:
    with without_triggers(path) as opened:
        for old, new in ((2, 9), (3, 2), (9, 3)):
            opened.execute("UPDATE entries SET number = ? WHERE number = ?", (new, old))


def one_put_behind(path: Path) -> None:
    with database(path) as opened:
        opened.execute("INSERT INTO entries VALUES (5, '{\"kind\":\"settle\"}', 'none')")


def the_end_cut_off(path: Path) -> None:
    with without_triggers(path) as opened:
        opened.execute("DELETE FROM entries WHERE number > 2")


def all_taken_out(path: Path) -> None:
    with without_triggers(path) as opened:
        opened.execute("DELETE FROM entries")


def all_written_anew(path: Path) -> None:
    rewrite(path, [text.replace("three", "other") for text in texts_of(path)])


def the_file_emptied(path: Path) -> None:
    path.write_bytes(b"")


def the_file_gone(path: Path) -> None:
    path.unlink()


def the_head_gone(path: Path) -> None:
    head_of(path).unlink()


def the_head_of_another(path: Path) -> None:
    head_of(path).write_text(json.dumps({"number": 3, "hash": "1" * 64}))


def the_head_ahead(path: Path) -> None:
    noted = json.loads(head_of(path).read_text())
    head_of(path).write_text(json.dumps({**noted, "number": 5}))


def the_head_below_zero(path: Path) -> None:
    head_of(path).write_text(json.dumps({"number": -1, "hash": "0" * 64}))


def the_head_something_else(path: Path) -> None:
    head_of(path).write_text('{"number": Infinity, "hash": ""}')


HARMS = {
    a_word_changed: "entry 2 was changed: its hash does not match",
    not_even_text: "entry 2 was changed: its hash does not match",
    a_hash_changed: "entry 2 was changed: its hash does not match",
    one_taken_out: "entry 2 was changed: it is missing, 3 follows",
    two_swapped: "entry 2 was changed: its hash does not match",
    one_put_behind: "entry 5 was changed: its hash does not match",
    the_end_cut_off: r"entry 3 is missing: ledger.db.head records 4 entries",
    all_taken_out: r"entry 1 is missing: ledger.db.head records 4 entries",
    all_written_anew: r"entry 4 is not the one in ledger.db.head",
    the_file_emptied: r"entry 1 is missing: ledger.db.head records 4 entries",
    the_file_gone: r"expected 4 entries by ledger.db.head, found no file",
    the_head_gone: r"ledger.db.head: expected the newest entry's number and hash, found no file",
    the_head_of_another: r"entry 3 is not the one in ledger.db.head",
    the_head_ahead: r"entry 5 is missing: ledger.db.head records 5 entries",
    the_head_below_zero: r"entry -1 is not the one in ledger.db.head",
    the_head_something_else: r"ledger.db.head: expected .*, found something else",
}


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_tampering_is_found_on_open(
    path: Path, harm: Callable[[Path], None], read_only: bool
) -> None:
    append(path, "one", "two", "three", "four")
    harm(path)
    for _ in range(2):  # the first check repairs nothing
        with pytest.raises(LedgerTampered, match=HARMS[harm]):
            HashChain(path, read_only=read_only)


def test_vacuumed_and_copied_file_is_accepted(path: Path, tmp_path: Path) -> None:
    """Negative control: opened, vacuumed by another program and restored from a copy."""
    append(path, "one", "two", "three", "four")
    with database(path) as opened:
        opened.execute("VACUUM")
    shutil.copytree(path.parent, tmp_path / "copy")
    shutil.rmtree(path.parent)
    (tmp_path / "copy").rename(path.parent)
    with HashChain(path) as chain:
        chain.verify()
    assert kinds(path) == ["one", "two", "three", "four"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.db"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "ledger.db"
    append(path, "one", "two", "three", "four")
    return path


def opened_after(written: Path, harm: Callable[[Path], None]) -> list[tuple[Entry, ...] | str]:
    """Return what a reader and a writer find in a damaged copy: its entries or the error."""
    found: list[tuple[Entry, ...] | str] = []
    for read_only in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(shutil.copy(written, folder))
            shutil.copy(head_of(written), folder)
            harm(path)
            try:
                with HashChain(path, read_only=read_only) as chain:
                    chain.verify()
                    found.append(chain.entries)
            except LedgerError as error:
                found.append(str(error))
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_changed_byte_is_found_or_alters_no_entry(written: Path, data: st.DataObject) -> None:
    size = written.stat().st_size
    content = written.read_bytes()
    held = [i for i in range(size) if content[i]]  # most bytes of the file are zero
    place = data.draw(st.one_of(st.integers(0, size - 1), st.sampled_from(held)))
    other = data.draw(st.integers(1, 255)) ^ content[place]

    def harm(path: Path) -> None:
        path.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])

    with HashChain(written, read_only=True) as chain:
        truth = chain.entries
    for outcome in opened_after(written, harm):
        assert outcome == truth or isinstance(outcome, str)
    entries = content.index(b'{"kind"'), content.rindex(b"}") + 1 + 64
    if entries[0] <= place < entries[1] and chr(content[place]).isprintable():
        assert isinstance(opened_after(written, harm)[0], str)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_found(written: Path, share: float) -> None:
    length = int(share * written.stat().st_size)
    for outcome in opened_after(written, lambda path: os.truncate(path, length)):
        assert isinstance(outcome, str)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["number", "hash", "x"]), inner)
    ),
)


@settings(max_examples=30, deadline=None)
@given(head=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20))
def test_invalid_head_file_is_found(written: Path, head: bytes) -> None:
    def harm(path: Path) -> None:
        head_of(path).write_bytes(head)

    for outcome in opened_after(written, harm):
        assert isinstance(outcome, str)


def test_forged_file_and_head_differ_from_a_saved_head(path: Path) -> None:
    """Whoever may write the file can rewrite it; only a saved head shows that."""
    append(path, "one", "two", "three")
    with HashChain(path) as chain:
        kept = chain.head
    rewrite(path, [text.replace("three", "other") for text in texts_of(path)])
    with database(path) as opened:
        number, found = opened.execute("SELECT max(number), hash FROM entries").fetchone()
    head_of(path).write_text(json.dumps({"number": number, "hash": found}))
    with HashChain(path) as chain:
        chain.verify()  # the forged file is consistent
        assert chain.head.number == kept.number
        assert chain.head != kept


@pytest.mark.parametrize(
    "text",
    [
        '{"kind":"one"}',
        '{"kind":"one","number":1,"time":"soon"}',
        '{"kind":"one","number":1,"time":"2026-01-01T00:00:00"}',  # no time zone
        '{"kind":"one","number":1,"time":17}',
        '{"kind":1,"number":1,"time":"2026-01-01T00:00:00+00:00"}',
        '{"kind":"one","number":2,"time":"2026-01-01T00:00:00+00:00"}',
        '{"number":1,"kind":"one","time":"2026-01-01T00:00:00+00:00"}',  # keys in the wrong order
        '{"kind":"one","number":1,"time":"2026-01-01T00:00:00+00:00","x":NaN}',
        "[]",
        "none",
        "",
    ],
)
def test_malformed_entry_with_valid_hash_is_found(path: Path, text: str) -> None:
    append(path, "one")
    rewrite(path, [text])
    head_of(path).write_text(json.dumps({"number": 0, "hash": "0" * 64}))
    with pytest.raises(
        LedgerTampered, match=r"entry 1 was changed: it (cannot be read|is not in the format)"
    ):
        HashChain(path)


def test_entry_older_than_its_predecessor_is_found(path: Path) -> None:
    append(path, "one", "two")
    one, two = (json.loads(text) for text in texts_of(path))
    before = datetime.fromisoformat(one["time"]) - timedelta(hours=1)
    two["time"] = before.isoformat()
    rewrite(path, [json.dumps(each, sort_keys=True, separators=(",", ":")) for each in (one, two)])
    head_of(path).write_text(json.dumps({"number": 0, "hash": "0" * 64}))
    with pytest.raises(LedgerTampered, match="entry 2 was changed: its time is before"):
        HashChain(path)


def test_stale_head_after_a_crash_is_repaired_on_write(path: Path) -> None:
    append(path, "one", "two")
    behind = head_of(path).read_bytes()
    append(path, "three")
    newest = head_of(path).read_bytes()
    head_of(path).write_bytes(behind)
    assert kinds(path) == ["one", "two", "three"]
    assert head_of(path).read_bytes() == behind  # a reader repairs nothing
    HashChain(path).close()
    assert head_of(path).read_bytes() == newest


def test_crash_during_creation_leaves_a_usable_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"")
    head_of(path).write_text(json.dumps({"number": 0, "hash": "0" * 64}) + "\n")
    assert kinds(path) == []
    append(path, "one")
    assert kinds(path) == ["one"]


KILLED = """
import os, signal, sys
from pathlib import Path
from polyclinic.client.ledger.hash_chain import HashChain
chain = HashChain(Path(sys.argv[1]))
with chain.transaction():
    chain.append("kept")
chain._database.execute("BEGIN IMMEDIATE")
chain.append("lost")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_process_leaves_committed_entries_and_no_lock(path: Path) -> None:
    for number in range(1, 4):
        died = subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, check=False)
        assert died.returncode == -9
        assert path.with_name("ledger.db-wal").stat().st_size > 0
        assert kinds(path) == ["kept"] * number


def test_lost_write_ahead_log_is_found(path: Path) -> None:
    """The killed process left its entries in the write-ahead log only."""
    subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, check=False)
    subprocess.run([sys.executable, "-c", KILLED, path], cwd=ROOT, check=False)
    for name in ("ledger.db-wal", "ledger.db-shm"):
        path.with_name(name).unlink()
    with pytest.raises(LedgerTampered, match=r"ledger.db.head records 2 entries"):
        HashChain(path)


def test_turn_sees_entries_of_other_processes(path: Path) -> None:
    with HashChain(path) as one, HashChain(path) as other:
        with one.transaction():
            first = one.append("one")
        assert other.entries == ()
        with other.transaction():
            assert other.entries == (first,)
            second = other.append("two")
        with one.transaction():
            assert one.entries == (first, second)
    assert kinds(path) == ["one", "two"]


TOGETHER = """
import sys
from pathlib import Path
from polyclinic.client.ledger.hash_chain import HashChain
print("ready", flush=True)
sys.stdin.readline()
with HashChain(Path(sys.argv[1]), timeout_s=60) as chain:
    for number in range(int(sys.argv[2])):
        with chain.transaction():
            chain.append("by " + sys.argv[3], count=number)
"""


@contextlib.contextmanager
def together(count: int, *arguments: object) -> Iterator[None]:
    """Run several writer processes that start together; fail unless all of them exit with 0."""
    program = [sys.executable, "-c", TOGETHER, *map(str, arguments)]
    pipe = subprocess.PIPE
    writers = [
        subprocess.Popen([*program, str(k)], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        for k in range(count)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        yield
        assert [writer.wait() for writer in writers] == [0] * count
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_concurrent_creation_and_writing_loses_no_entry(path: Path) -> None:
    with together(4, path, 10):
        pass
    with HashChain(path) as chain:
        chain.verify()
        for k in range(4):
            mine = [entry.content["count"] for entry in chain.entries if entry.kind == f"by {k}"]
            assert mine == list(range(10))
    assert json.loads(head_of(path).read_text())["number"] == 40


def test_reader_during_writes_sees_a_consistent_prefix(path: Path) -> None:
    append(path, "first")
    seen = []
    with together(2, path, 30):
        while not seen or seen[-1] < 61:
            with HashChain(path, read_only=True) as chain:
                chain.verify()
                seen.append(len(chain.entries))
    assert seen == sorted(seen)
    assert len(set(seen)) > 2  # it read intermediate states as well


def test_reader_during_first_entry_raises_no_tampering(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    path.touch()
    looks = iter(["is there a file?", "what does the head say?"])
    look = HashChain._noted

    def slowly(chain: HashChain) -> Head | None:
        found = look(chain)
        if next(looks, "") == "what does the head say?":
            append(path, "one")
        return found

    monkeypatch.setattr(HashChain, "_noted", slowly)
    assert kinds(path) == ["one"]


def test_concurrent_creation_waits_for_the_other_process(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    check = HashChain._check_kind
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    release = threading.Timer(0.2, lambda: other.execute("ROLLBACK"))

    def then_be_late(chain: HashChain) -> None:
        check(chain)
        other.execute("BEGIN IMMEDIATE")
        release.start()

    monkeypatch.setattr(HashChain, "_check_kind", then_be_late)
    with contextlib.closing(other):
        HashChain(path).close()
        release.join()


def test_file_created_concurrently_is_recognised(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    path.touch()
    look = HashChain._pragma

    def then_be_late(chain: HashChain, name: str) -> int:
        found = look(chain, name)
        monkeypatch.setattr(HashChain, "_pragma", look)
        append(path, "one")
        return found

    monkeypatch.setattr(HashChain, "_pragma", then_be_late)
    append(path, "two")
    assert kinds(path) == ["one", "two"]


def test_locked_file_is_refused_after_the_timeout(path: Path) -> None:
    append(path, "one")
    with HashChain(path, timeout_s=0.05) as chain, database(path) as other:
        other.execute("BEGIN IMMEDIATE")
        said = r"ledger.db: locked by another process for 0.05 s; .* wait for it"
        with pytest.raises(LedgerError, match=said):
            append_in(chain, "two")
        with pytest.raises(LedgerError, match=said):
            HashChain(path, timeout_s=0.05)
        assert kinds(path) == ["one"]  # readers do not wait
        other.execute("ROLLBACK")
        with chain.transaction():
            chain.append("two")
    assert kinds(path) == ["one", "two"]


def test_entry_is_kept_when_the_head_update_fails(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(path, "one")
    behind = head_of(path).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "the disk groans")

    with HashChain(path) as chain:
        monkeypatch.setattr(Path, "replace", refuse)
        with chain.transaction():
            chain.append("two")
        monkeypatch.undo()
    assert "not updated to the newest entry" in caplog.text
    assert head_of(path).read_bytes() == behind
    append(path, "three")
    assert kinds(path) == ["one", "two", "three"]
    assert json.loads(head_of(path).read_text())["number"] == 3


@pytest.mark.parametrize("harm", [a_word_changed, one_taken_out, the_head_gone, the_head_ahead])
def test_change_to_an_open_file_is_found_by_verify(
    path: Path, harm: Callable[[Path], None]
) -> None:
    append(path, "one", "two", "three", "four")
    with HashChain(path) as chain:
        harm(path)
        with pytest.raises(LedgerTampered, match=HARMS[harm]):
            chain.verify()


def test_changed_newest_entry_is_found_before_append(path: Path) -> None:
    append(path, "one", "two")
    with HashChain(path) as chain:
        a_hash_changed(path)
        with pytest.raises(LedgerTampered, match=r"entry 2 .* it changed since it was read"):
            append_in(chain, "three")


def test_replaced_open_file_is_found_on_append(path: Path, tmp_path: Path) -> None:
    append(path, "one")
    shutil.copytree(path.parent, tmp_path / "earlier")
    with HashChain(path) as chain:
        (tmp_path / "earlier" / path.name).replace(path)
        with pytest.raises(LedgerTampered, match="replaced by another file"):
            append_in(chain, "two")
        path.unlink()
        with pytest.raises(LedgerTampered, match="replaced by another file"):
            append_in(chain, "two")


def test_newer_schema_is_refused_and_left_unchanged(path: Path) -> None:
    append(path, "one")
    with database(path) as opened:
        opened.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=rf"newer Polyclinic \(schema {SCHEMA + 1}.* update"):
            HashChain(path, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("statement", ["CREATE TABLE cats (name)", "PRAGMA application_id = 7"])
def test_foreign_database_is_refused_and_left_unchanged(path: Path, statement: str) -> None:
    path.parent.mkdir()
    with database(path) as opened:
        opened.execute(statement)
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(LedgerError, match="found another program's database"):
            HashChain(path, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("length", [7, 5000])
def test_non_database_file_is_refused_and_left_unchanged(path: Path, length: int) -> None:
    path.parent.mkdir()
    path.write_bytes(b"budget " * (length // 7))
    for read_only in (False, True):
        with pytest.raises(LedgerError, match="expected a ledger, found no database"):
            HashChain(path, read_only=read_only)
    assert path.read_bytes() == b"budget " * (length // 7)


def test_damaged_page_is_found_before_writing(path: Path) -> None:
    append(path, *"abcdefghijklmnopqrst")
    content = bytearray(path.read_bytes())
    content[4096:8192] = os.urandom(4096)
    path.write_bytes(content)
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=r"ledger.db: damaged.*backup"):
            HashChain(path, read_only=read_only)
    assert path.read_bytes() == content


def test_damage_outside_the_entries_is_found(path: Path) -> None:
    append(path, "one")
    content = bytearray(path.read_bytes())
    content[36:40] = (7).to_bytes(4, "big")  # SQLite's count of free pages
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger.db: damaged \(.*freelist.*7\); .*backup"):
        HashChain(path)
    with HashChain(path, read_only=True) as chain, pytest.raises(LedgerError, match="damaged"):
        chain.verify()
    assert path.read_bytes() == content


def test_reading_a_missing_file_is_refused_and_creates_nothing(path: Path) -> None:
    with pytest.raises(LedgerError, match="no such ledger"):
        HashChain(path, read_only=True)
    assert not path.parent.exists()


def test_path_that_cannot_hold_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match=r"file/ledger.db.head: cannot be read: Not a directory"):
        HashChain(tmp_path / "file" / "ledger.db")
    (tmp_path / "folder" / "ledger.db").mkdir(parents=True)
    with pytest.raises(LedgerError, match="cannot be opened"):
        HashChain(tmp_path / "folder" / "ledger.db")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that shifts the clock by some seconds."""

    def move(seconds: float) -> None:
        monkeypatch.setattr(
            polyclinic.client.ledger.hash_chain,
            "_now",
            lambda: datetime.now(UTC) + timedelta(seconds=seconds),
        )

    return move


def test_clock_set_back_is_refused_for_writing(path: Path, clock: Callable[[float], None]) -> None:
    append(path, "one")
    with HashChain(path) as chain:
        clock(-120)
        said = r"the clock went back: entry 1 was written at 20.*, now it is 20.*; correct the"
        with pytest.raises(LedgerError, match=said):
            append_in(chain, "two")
        with pytest.raises(LedgerError, match=said):
            HashChain(path)
        assert kinds(path) == ["one"]  # reading does not depend on the clock
        clock(0)
        with chain.transaction():
            chain.append("two")
    assert kinds(path) == ["one", "two"]


def test_clock_set_back_within_a_turn_writes_nothing(
    path: Path, clock: Callable[[float], None]
) -> None:
    append(path, "one")

    def be_late(chain: HashChain) -> None:
        with chain.transaction():
            clock(-120)
            chain.append("two")

    with HashChain(path) as chain:
        with pytest.raises(LedgerError, match="the clock went back"):
            be_late(chain)
        clock(0)
    append(path, "three")
    assert kinds(path) == ["one", "three"]


def test_clock_set_back_under_a_minute_is_accepted(
    path: Path, clock: Callable[[float], None]
) -> None:
    for seconds in (0, -30, -50):
        clock(seconds)
        append(path, "one")
    assert kinds(path) == ["one"] * 3


@pytest.fixture
def shared() -> Iterator[Path]:
    """Create a folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        Path(folder).chmod(0o755)


@contextlib.contextmanager
def bound_by_modes() -> Iterator[None]:
    """Drop root's privileges for a while, since root ignores file modes."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def only_read(path: Path) -> None:
    for place in (*path.parent.iterdir(), path.parent):
        place.chmod(0o555 if place.is_dir() else 0o444)


def test_read_only_file_is_readable_and_refused_for_writing(shared: Path) -> None:
    path = shared / "ledger.db"
    append(path, "one")
    only_read(path)
    with bound_by_modes():
        with pytest.raises(LedgerError, match=r"read only; .* make it writable for this user"):
            HashChain(path)
        assert kinds(path) == ["one"]
    assert sorted(place.name for place in shared.iterdir()) == ["ledger.db", "ledger.db.head"]


def test_head_written_by_another_user_allows_append(shared: Path) -> None:
    """This happens when root lowers delta for the user that trains."""
    path = shared / "ledger.db"
    append(path, "one")
    shared.chmod(0o777)
    path.chmod(0o666)
    head_of(path).chmod(0o444)
    with bound_by_modes():
        append(path, "two")
    assert kinds(path) == ["one", "two"]


def test_unwritable_folder_is_refused(shared: Path) -> None:
    shared.chmod(0o555)
    with bound_by_modes():
        with pytest.raises(LedgerError, match=f"{shared}: read only"):
            HashChain(shared / "ledger.db")
        with pytest.raises(LedgerError, match=r"state: cannot be created: Permission denied"):
            HashChain(shared / "state" / "ledger.db")


def test_file_found_read_only_by_sqlite_is_refused(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system looks writable to root."""
    path = shared / "ledger.db"
    append(path, "one")
    only_read(path)
    monkeypatch.setattr(os, "access", lambda *_: True)
    with bound_by_modes(), pytest.raises(LedgerError, match=r"read only|cannot be opened"):
        HashChain(path)
    assert kinds(path) == ["one"]


def test_full_disk_for_head_refuses_before_the_entry(path: Path) -> None:
    append(path, "one")
    with HashChain(path) as chain:
        path.with_name(".ledger.db.head").symlink_to("/dev/full")
        with pytest.raises(LedgerError, match="No space left on device"):
            append_in(chain, "two")
        path.with_name(".ledger.db.head").unlink()
        assert [entry.kind for entry in chain.entries] == kinds(path) == ["one"]
        with chain.transaction():
            chain.append("three")
    assert kinds(path) == ["one", "three"]


def test_full_disk_for_entry_is_refused(path: Path) -> None:
    append(path, "one")
    with HashChain(path) as chain:
        pages = chain._pragma("page_count")
        chain._database.execute(
            f"PRAGMA max_page_count = {pages}"
        )  # to SQLite the disk is then full
        with pytest.raises(LedgerError, match="the disk is full; nothing was written"):
            append_in(chain, "-" * 10000)
        assert [entry.kind for entry in chain.entries] == kinds(path) == ["one"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk is a mounted tmpfs, which this user may not create")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path, leave: int) -> None:
    """Fill the disk up to the given number of free bytes, rounded to pages."""
    filling = place / "filling"
    filling.unlink(missing_ok=True)
    with filling.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"-" * 4096):
            pass
    os.truncate(filling, max(filling.stat().st_size - leave, 0))


def test_append_on_a_full_disk_is_atomic(small_disk: Path) -> None:
    path = small_disk / "ledger.db"
    append(path, "first")
    expected, refusals = ["first"], []

    def on_full(pages: int, write: Callable[[str], None], kind: str) -> None:
        fill(small_disk, pages * 4096)
        try:
            write(kind)
            expected.append(kind)
        except LedgerError as error:
            refusals.append(str(error))
        (small_disk / "filling").unlink()
        assert kinds(path) == expected

    for pages in range(14):
        on_full(pages, lambda kind: append(path, kind), f"opened with {pages}")
    with HashChain(path) as chain:
        for pages in range(6):
            on_full(pages, lambda kind: append_in(chain, kind), f"at work with {pages}")
            assert [entry.kind for entry in chain.entries] == expected
    assert len(refusals) > 2
    words = ("the disk is full", "is the disk full", "No space left")
    assert all(any(each in said for each in words) for said in refusals), refusals
    append(path, "last")
    assert kinds(path) == [*expected, "last"]
