"""A file that only grows, and shows it if anyone changed it.

Entries lie in a SQLite file, each with a hash over itself and the hash before it; a small file
beside it holds the newest entry's number and hash, so that cutting off the end is found too. An
entry is durable once it is appended (write-ahead log, full synchronisation), and processes take
turns: who writes sees all that was written before.

    <name>        the entries
    <name>-wal    SQLite's; belongs to the entries while a process is at work, and after a crash
    <name>-shm
    <name>.head   {"number": 12, "hash": "..."}
    .<name>.head  the next of these, before it is put in place

The head file is made before the first entry and written after each commit. So it may be behind
(a crash in between, which the next who opens the file repairs), and never ahead. Whoever may write
in the folder can forge all of it together; a copy of ``HashChain.head`` elsewhere shows that as
well.

LedgerError           the file cannot be used; nothing was written
└── LedgerTampered    what it holds is not what was written
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCHEMA = 1
CLOCK_TOLERANCE_S = 60.0  # that a clock may be set back between two entries

_APPLICATION = int.from_bytes(b"PcLg", "big")  # in SQLite's header
_NO_HASH = "0" * 64  # before the first entry
_TABLES = f"""
CREATE TABLE entries (
    number INTEGER PRIMARY KEY,
    content TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT;
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries
BEGIN SELECT RAISE(ABORT, 'entries are never changed'); END;
CREATE TRIGGER entries_are_kept BEFORE DELETE ON entries
BEGIN SELECT RAISE(ABORT, 'entries are never deleted'); END;
CREATE TRIGGER entries_follow BEFORE INSERT ON entries
WHEN NEW.number IS NOT (SELECT coalesce(max(number), 0) + 1 FROM entries)
BEGIN SELECT RAISE(ABORT, 'entries are numbered one by one'); END;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {SCHEMA};
"""

log = logging.getLogger(__name__)


class LedgerError(RuntimeError):
    """A ledger cannot be used or a request of it is refused. The message says what to do."""


class LedgerTampered(LedgerError):
    """What a ledger holds is not what was written. The message names the first entry."""


@dataclass(frozen=True)
class Head:
    """The newest entry: if it is as it was, so are all before it."""

    number: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """One entry as it was written."""

    number: int
    content: Mapping[str, Any]  # time (UTC, ISO), kind, and what the kind wants
    hash: str

    @property
    def kind(self) -> str:
        return str(self.content["kind"])

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.content["time"])


class HashChain:
    """An append-only file, open.

    To be used by one thread, and not across a fork.

    Args:
        path: the file; it and its folder are made if they are not there.
        read_only: open what is there, beside whoever writes; nothing can be appended.
        timeout_s: how long to wait for another process's turn to end.

    Raises:
        LedgerTampered: if an entry, or the end, is not what was written.
        LedgerError: if the file is locked, damaged, read only, another program's, or of a newer
            version; and for writing, if its newest entry lies in the future.
    """

    def __init__(self, path: Path, *, read_only: bool = False, timeout_s: float = 5.0) -> None:
        self.path = path
        self._head_path = path.with_name(f"{path.name}.head")
        self._new_head_path = path.with_name(f".{path.name}.head")
        self._timeout_s = timeout_s
        self._entries: list[Entry] = []
        self._inode = 0
        noted = self._noted()
        if noted is not None and noted.number and not path.exists():
            raise LedgerTampered(
                f"{path}: expected {noted.number} entries by {self._head_path.name}, found no "
                "file; put it back from where it was moved, or from a backup that holds them all"
            )
        if read_only and not path.exists():
            raise LedgerError(f"{path}: no such ledger")
        if not read_only:
            self._make_place()
        self._database = self._connected(read_only)
        try:
            with self._explained():
                self._check_kind()
                if read_only:
                    self._read()
                else:
                    self._open()
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries that this process has seen, oldest first."""
        return tuple(self._entries)

    @property
    def head(self) -> Head:
        """The newest of ``entries``; number 0 before the first."""
        return _head(self._entries)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Take the turn to write: inside, ``entries`` is all there is, and ``append`` works.

        What was appended is written together at the end, or, after any error, not at all.

        Raises:
            LedgerError: if another process keeps its turn too long, the clock went back, or the
                disk is full.
            LedgerTampered: if the file changed otherwise than by new entries.
        """
        with self._explained():
            self._database.execute("BEGIN IMMEDIATE")
        before = len(self._entries)
        try:
            with self._explained():
                self._catch_up()
                before = len(self._entries)
            yield
            if len(self._entries) > before:
                self._prepare(self.head)
            with self._explained():
                self._database.execute("COMMIT")
        except BaseException:
            del self._entries[before:]
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        if len(self._entries) > before:
            self._note()

    def append(self, kind: str, **content: object) -> Entry:
        """Write an entry, within ``turn``. Values are what JSON holds, and finite."""
        if not self._database.in_transaction:
            raise RuntimeError("append: expected to be within turn(), was called outside")
        self._check_clock()  # an entry that lies too early would spoil the file for good
        before = self.head
        text = _canonical(
            {**content, "number": before.number + 1, "time": _now().isoformat(), "kind": kind}
        )
        entry = Entry(before.number + 1, json.loads(text), _hash(before.hash, text))
        with self._explained():
            self._database.execute(
                "INSERT INTO entries VALUES (?, ?, ?)", (entry.number, text, entry.hash)
            )
        self._entries.append(entry)
        return entry

    def verify(self) -> None:
        """Read everything again from the disk, and check all that can be checked.

        Raises:
            LedgerTampered: naming the first entry that does not fit.
            LedgerError: if SQLite finds its file damaged.
        """
        with self._explained():
            self._check_pages("integrity_check")
        self._entries = []
        with self._explained():
            self._read()

    def _make_place(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"{self.path.parent}: cannot be made: {error.strerror}") from None
        for place in (self.path.parent, self.path):  # a head is replaced, which asks the folder
            if place.exists() and not os.access(place, os.W_OK):
                raise LedgerError(
                    f"{place}: read only; training with privacy writes down what it spends, so "
                    "make it writable for this user"
                )

    def _connected(self, read_only: bool) -> sqlite3.Connection:
        uri = self.path.absolute().as_uri() + ("?mode=ro" if read_only else "?mode=rwc")
        try:
            with self._explained():
                return self._try(uri)
        except LedgerError:
            # without -wal there is nobody at work, and SQLite need not make files to read
            if not read_only or self.path.with_name(f"{self.path.name}-wal").exists():
                raise
        with self._explained():
            return self._try(f"{uri}&immutable=1")

    def _try(self, uri: str) -> sqlite3.Connection:
        # statements begin transactions where this code says so, not where Python would
        database = sqlite3.connect(uri, self._timeout_s, uri=True, isolation_level=None)
        # a damaged byte need not be UTF-8; as another text it does not fit its hash, and is found
        database.text_factory = partial(str, encoding="utf-8", errors="replace")
        try:
            database.execute("PRAGMA synchronous = FULL")
            # Checkpoints are left to who closes last. Before 3.51.3, one that ran beside another
            # process's commit could, very rarely, lose that commit.
            database.execute("PRAGMA wal_autocheckpoint = 0")
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    def _check_kind(self) -> None:
        # tables first: another process may make them, together with the rest, between two looks
        tables = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = self._pragma("application_id")
        version = self._pragma("user_version")
        if application != _APPLICATION and (tables or application):
            raise LedgerError(f"{self.path}: expected a ledger, found another program's database")
        if version > SCHEMA:
            raise LedgerError(
                f"{self.path}: was written by a newer Polyclinic (schema {version}, this one "
                f"knows {SCHEMA}); update this installation"
            )

    def _check_pages(self, check: str) -> None:
        rows = [str(row[0]) for row in self._database.execute(f"PRAGMA {check}")]
        if rows != ["ok"]:
            lines = [line for row in rows for line in row.splitlines() if line[:3] != "***"]
            raise LedgerError(f"{self.path}: damaged ({'; '.join(lines[:3])}); {_FROM_BACKUP}")

    def _pragma(self, name: str) -> int:
        return int(self._database.execute(f"PRAGMA {name}").fetchone()[0])

    def _open(self) -> None:
        if (mode := self._to_wal()) != "wal":
            raise LedgerError(
                f"{self.path}: SQLite cannot keep a write-ahead log there (it offers {mode}); "
                "put state on a local disk"
            )
        self._check_pages("quick_check")
        self._database.execute("BEGIN IMMEDIATE")  # nobody writes entries or head meanwhile
        try:
            if self._pragma("application_id") == 0:
                for statement in _statements(_TABLES):
                    self._database.execute(statement)
            self._inode = self.path.stat().st_ino
            noted = self._read_once()
            self._check_clock()
            if noted != self.head:
                self._write_head(self.head)
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        _sync(self.path.parent)

    def _to_wal(self) -> str:
        """Turn a new file to write-ahead logging; SQLite does not wait for others who do so too."""
        give_up = time.monotonic() + self._timeout_s
        while True:
            try:
                return str(self._database.execute("PRAGMA journal_mode = WAL").fetchone()[0])
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > give_up:
                    raise
            time.sleep(0.01)

    def _read(self) -> None:
        """Read entries that another process may be adding to."""
        try:
            self._read_once()
        except LedgerTampered:
            # the very first entry may have come between the look at the head and at the entries
            self._entries = []
            self._read_once()

    def _read_once(self) -> Head | None:
        noted = self._noted()  # before the entries: behind it they may be, ahead of it not
        if self._pragma(
            "application_id"
        ):  # else it is empty, as a new one is, or one cut to nothing
            self._extend()
        self._check_noted(noted)
        return noted

    def _catch_up(self) -> None:
        """Read, within a turn, what other processes have written since."""
        if not self.path.exists() or self.path.stat().st_ino != self._inode:
            raise LedgerTampered(
                f"{self.path}: was replaced by another file while it was in use; start again"
            )
        if self._entries:
            newest = self.head
            row = self._database.execute(
                "SELECT hash FROM entries WHERE number = ?", (newest.number,)
            ).fetchone()
            if row is None or row[0] != newest.hash:
                raise self._tampered(newest.number, "it is not what it was a moment ago")
        self._extend()
        self._check_noted(self._noted())

    def _extend(self) -> None:
        """Read the entries behind those that are known, and check each."""
        rows = self._database.execute(
            "SELECT number, content, hash FROM entries WHERE number > ? ORDER BY number",
            (len(self._entries),),
        )
        for number, text, found in rows:
            before = self.head
            expected = before.number + 1
            if number != expected:
                raise self._tampered(expected, f"it is missing, {number} follows")
            if found != _hash(before.hash, text):
                raise self._tampered(number, "its hash does not fit it and the entry before")
            try:
                content = json.loads(text)
                entry = Entry(number, content, found)
                fits = text == _canonical(content) and content["number"] == number
                newest = self._entries[-1].time if self._entries else _EPOCH
                late = newest - entry.time > _TOLERANCE
            except (ValueError, TypeError, KeyError, AttributeError):
                raise self._tampered(number, "it cannot be read") from None
            if not fits or not isinstance(content.get("kind"), str):
                raise self._tampered(number, "it is not as this program writes entries")
            if late:
                raise self._tampered(number, "its time lies before that of the entry before")
            self._entries.append(entry)

    def _tampered(self, number: int, why: str) -> LedgerTampered:
        return LedgerTampered(f"{self.path}: entry {number} was changed: {why}; {_FROM_BACKUP}")

    def _check_noted(self, noted: Head | None) -> None:
        if noted is None:
            if self._entries:
                raise LedgerTampered(
                    f"{self._head_path}: expected the newest entry's number and hash, found no "
                    f"file; without it nobody can tell whether entries are missing. {_FROM_BACKUP}"
                )
        elif noted.number > len(self._entries):
            raise LedgerTampered(
                f"{self.path}: entry {len(self._entries) + 1} is missing: "
                f"{self._head_path.name} knows of {noted.number} entries; {_FROM_BACKUP}"
            )
        elif noted != _head(self._entries[: noted.number]):
            raise LedgerTampered(
                f"{self.path}: entry {noted.number} is not the one that {self._head_path.name} "
                f"knows; {_FROM_BACKUP}"
            )

    def _check_clock(self) -> None:
        if self._entries and (newest := self._entries[-1].time) > _now() + _TOLERANCE:
            raise LedgerError(
                f"{self.path}: the clock went back: entry {self.head.number} was written at "
                f"{newest.isoformat()}, now it is {_now().isoformat()}; set the clock right"
            )

    def _noted(self) -> Head | None:
        """What the head file says; None if there is none."""
        try:
            content = json.loads(self._head_path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(f"{self._head_path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            content = None
        match content:
            case {"number": int(number), "hash": str(found)}:
                return Head(number, found)
        raise LedgerTampered(
            f"{self._head_path}: expected the newest entry's number and hash, found something "
            f"else; {_FROM_BACKUP}"
        )

    def _note(self) -> None:
        """Write the newest entry to the head file; nobody else does at the same time."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                number, found = self._database.execute(
                    "SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1"
                ).fetchone()
                self._write_head(Head(number, found))
            finally:
                self._database.execute("ROLLBACK")
        except (sqlite3.OperationalError, LedgerError) as error:
            # the entry is safe, and whoever writes next finds the head behind and repairs it
            log.warning("%s: left behind the newest entry: %s", self._head_path, error)

    def _write_head(self, head: Head) -> None:
        """Put a head in place of the last; within a turn, so that nobody else does."""
        self._prepare(head)
        try:
            self._new_head_path.replace(self._head_path)
            _sync(self._head_path.parent)
        except OSError as error:
            raise LedgerError(f"{self._head_path}: cannot be written: {error.strerror}") from None

    def _prepare(self, head: Head) -> None:
        """Write a head beside the head file.

        Before a commit, so that a full disk is found while nothing is written yet; after it, the
        same bytes in place, which need no more room.
        """
        text = json.dumps({"number": head.number, "hash": head.hash}).encode() + b"\n"
        try:
            opened = os.open(self._new_head_path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.write(opened, text)
                os.ftruncate(opened, len(text))
                os.fsync(opened)
            finally:
                os.close(opened)
        except OSError as error:
            raise LedgerError(
                f"{self._new_head_path}: cannot be written: {error.strerror}"
            ) from None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what SQLite's errors mean here."""
        try:
            yield
        except UnicodeDecodeError:  # of what SQLite has to say of a damaged table
            raise LedgerError(f"{self.path}: damaged; {_FROM_BACKUP}") from None
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            means = {
                sqlite3.SQLITE_BUSY: f"locked by another process for {self._timeout_s:g} s; if "
                "that one trains, wait for it, or else end it",
                sqlite3.SQLITE_READONLY: "read only; make file and folder writable for this user",
                sqlite3.SQLITE_CANTOPEN: "cannot be opened; is the folder readable and writable "
                "for this user?",
                sqlite3.SQLITE_FULL: "the disk is full; nothing was written",
                sqlite3.SQLITE_IOERR: "cannot be read or written (disk I/O error); is the disk "
                "full, over its quota, or failing?",
                sqlite3.SQLITE_NOTADB: f"expected a ledger, found no database; {_FROM_BACKUP}",
                sqlite3.SQLITE_CORRUPT: f"damaged; {_FROM_BACKUP}",
            }
            raise LedgerError(f"{self.path}: {means.get(code, f'SQLite says: {error}')}") from None


_FROM_BACKUP = "train no further with privacy before it is put back from a backup and explained"
_TOLERANCE = timedelta(seconds=CLOCK_TOLERANCE_S)
_EPOCH = datetime.fromtimestamp(0, UTC)


def _now() -> datetime:
    return datetime.now(UTC)


def _canonical(content: Mapping[str, object]) -> str:
    """The one way to write it down: keys sorted, no spaces, ASCII, finite numbers."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hash(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _head(entries: list[Entry]) -> Head:
    return Head(entries[-1].number, entries[-1].hash) if entries else Head(0, _NO_HASH)


def _statements(script: str) -> Iterator[str]:
    """A script's statements one by one; run as one, they would end the transaction."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _sync(folder: Path) -> None:
    """Make a folder's entries durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
