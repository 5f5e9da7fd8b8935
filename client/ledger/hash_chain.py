"""An append-only, tamper-evident log file.

The entries are stored in an SQLite database. Each entry has a hash over its own content and the
hash of the previous entry. A small head file holds the newest entry's number and hash, so that
truncation is detected too. An entry is durable once its transaction has ended (write-ahead log,
full synchronisation). Transactions of several processes run one after the other, and each of them
sees everything that was written before.

    <name>        the entries
    <name>-wal    SQLite's write-ahead log; holds entries during use and after a crash
    <name>-shm    SQLite's index of the write-ahead log
    <name>.head   {"number": 12, "hash": "..."}
    .<name>.head  the next head file, before it replaces the current one

The head file is created before the first entry and written after each commit. It can be behind the
entries, never ahead: after a crash between the two, the next process that opens the file for
writing repairs it. Anyone with write access to the folder can forge entries and head together; a
copy of ``HashChain.head`` in another place detects that as well.

LedgerError           the file cannot be used; nothing was written
└── LedgerTampered    the contents differ from what was written
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
CLOCK_TOLERANCE_S = 60.0  # how far the clock may go back between two entries, in seconds

_APPLICATION = int.from_bytes(b"PcLg", "big")  # application_id in SQLite's header
_NO_HASH = "0" * 64  # previous hash of the first entry
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
    """A ledger cannot be used, or it refuses a request. The message says what to do."""


class LedgerTampered(LedgerError):
    """A ledger's contents differ from what was written. The message names the first such entry."""


@dataclass(frozen=True)
class Head:
    """Number and hash of the newest entry; unchanged, it proves that no earlier entry changed."""

    number: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """One entry as it was written."""

    number: int
    content: Mapping[str, Any]  # number, time (UTC, ISO 8601), kind, and the fields of this kind
    hash: str

    @property
    def kind(self) -> str:
        return str(self.content["kind"])

    @property
    def time(self) -> datetime:
        return datetime.fromisoformat(self.content["time"])


class HashChain:
    """An open append-only file.

    Use it from one thread only, and not across a fork.

    Args:
        path: the file; it and its folder are created if they do not exist.
        read_only: open an existing file without the right to append; other processes may write to
            it at the same time.
        timeout_s: how long to wait for another process's transaction, in seconds.

    Raises:
        LedgerTampered: if an entry was changed or entries are missing.
        LedgerError: if the file is locked, damaged, read only, of another program or of a newer
            version; if it is opened for writing and its newest entry lies in the future.
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
                "file; move it back, or restore it from a backup that has all entries"
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
        """Number and hash of the newest of ``entries``; number 0 if there are none."""
        return _head(self._entries)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Open a write transaction, in which ``entries`` is complete and ``append`` is allowed.

        All appended entries are committed together at the end, or none of them after an error.

        Raises:
            LedgerError: if another process holds its transaction for too long, the clock went
                back, or the disk is full.
            LedgerTampered: if the file changed in any way other than by new entries.
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
        """Append an entry inside ``transaction``; values must be valid JSON with finite numbers."""
        if not self._database.in_transaction:
            raise RuntimeError("append: expected a call within turn(), was called outside")
        self._check_clock()  # an entry before its predecessor would make the file invalid forever
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
        """Read all entries from the disk again and run every check.

        Raises:
            LedgerTampered: if an entry does not match; names the first one.
            LedgerError: if SQLite reports a damaged file.
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
            raise LedgerError(f"{self.path.parent}: cannot be created: {error.strerror}") from None
        # replacing the head file needs write permission for the folder
        for place in (self.path.parent, self.path):
            if place.exists() and not os.access(place, os.W_OK):
                raise LedgerError(
                    f"{place}: read only; training with privacy records its budget there, so "
                    "make it writable for this user"
                )

    def _connected(self, read_only: bool) -> sqlite3.Connection:
        uri = self.path.absolute().as_uri() + ("?mode=ro" if read_only else "?mode=rwc")
        try:
            with self._explained():
                return self._try(uri)
        except LedgerError:
            # without -wal no process has it open, and SQLite can read it without creating files
            if not read_only or self.path.with_name(f"{self.path.name}-wal").exists():
                raise
        with self._explained():
            return self._try(f"{uri}&immutable=1")

    def _try(self, uri: str) -> sqlite3.Connection:
        # isolation_level=None: transactions are only begun explicitly, never by Python
        database = sqlite3.connect(uri, self._timeout_s, uri=True, isolation_level=None)
        # damaged text may be invalid UTF-8; decoded with replacements, its hash does not match
        database.text_factory = partial(str, encoding="utf-8", errors="replace")
        try:
            database.execute("PRAGMA synchronous = FULL")
            # Only the last process that closes the file makes a checkpoint. In SQLite before
            # 3.51.3, a checkpoint during another process's commit could, very rarely, lose it.
            database.execute("PRAGMA wal_autocheckpoint = 0")
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    def _check_kind(self) -> None:
        # Read the tables first: another process may create the tables and the application_id
        # together between two of these queries.
        tables = self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = self._pragma("application_id")
        version = self._pragma("user_version")
        if application != _APPLICATION and (tables or application):
            raise LedgerError(f"{self.path}: expected a ledger, found another program's database")
        if version > SCHEMA:
            raise LedgerError(
                f"{self.path}: was written by a newer Polyclinic (schema {version}, this one "
                f"supports {SCHEMA}); update this installation"
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
                "put the state folder on a local disk"
            )
        self._check_pages("quick_check")
        self._database.execute("BEGIN IMMEDIATE")  # no other process writes entries or head now
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
        """Switch to write-ahead logging; retry, since SQLite does not wait for a lock here."""
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
        """Read the entries while another process may append."""
        try:
            self._read_once()
        except LedgerTampered:
            # the first entry may have been appended between reading the head and the entries
            self._entries = []
            self._read_once()

    def _read_once(self) -> Head | None:
        noted = self._noted()  # read before the entries, which may only be newer than the head
        if self._pragma("application_id"):  # 0: the file is new, or was truncated to 0 bytes
            self._extend()
        self._check_noted(noted)
        return noted

    def _catch_up(self) -> None:
        """Read, inside a transaction, the entries that other processes have appended."""
        if not self.path.exists() or self.path.stat().st_ino != self._inode:
            raise LedgerTampered(
                f"{self.path}: was replaced by another file during use; restart this process"
            )
        if self._entries:
            newest = self.head
            row = self._database.execute(
                "SELECT hash FROM entries WHERE number = ?", (newest.number,)
            ).fetchone()
            if row is None or row[0] != newest.hash:
                raise self._tampered(newest.number, "it changed since it was read")
        self._extend()
        self._check_noted(self._noted())

    def _extend(self) -> None:
        """Read and check the entries after those already read."""
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
                raise self._tampered(number, "its hash does not match it and the previous entry")
            try:
                content = json.loads(text)
                entry = Entry(number, content, found)
                fits = text == _canonical(content) and content["number"] == number
                newest = self._entries[-1].time if self._entries else _EPOCH
                late = newest - entry.time > _TOLERANCE
            except (ValueError, TypeError, KeyError, AttributeError):
                raise self._tampered(number, "it cannot be read") from None
            if not fits or not isinstance(content.get("kind"), str):
                raise self._tampered(number, "it is not in the format of this program")
            if late:
                raise self._tampered(number, "its time is before that of the previous entry")
            self._entries.append(entry)

    def _tampered(self, number: int, why: str) -> LedgerTampered:
        return LedgerTampered(f"{self.path}: entry {number} was changed: {why}; {_FROM_BACKUP}")

    def _check_noted(self, noted: Head | None) -> None:
        if noted is None:
            if self._entries:
                raise LedgerTampered(
                    f"{self._head_path}: expected the newest entry's number and hash, found no "
                    f"file; without it missing entries cannot be detected. {_FROM_BACKUP}"
                )
        elif noted.number > len(self._entries):
            raise LedgerTampered(
                f"{self.path}: entry {len(self._entries) + 1} is missing: "
                f"{self._head_path.name} records {noted.number} entries; {_FROM_BACKUP}"
            )
        elif noted != _head(self._entries[: noted.number]):
            raise LedgerTampered(
                f"{self.path}: entry {noted.number} is not the one in {self._head_path.name}; "
                f"{_FROM_BACKUP}"
            )

    def _check_clock(self) -> None:
        if self._entries and (newest := self._entries[-1].time) > _now() + _TOLERANCE:
            raise LedgerError(
                f"{self.path}: the clock went back: entry {self.head.number} was written at "
                f"{newest.isoformat()}, now it is {_now().isoformat()}; correct the system clock"
            )

    def _noted(self) -> Head | None:
        """Read the head file; return None if there is none."""
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
        """Write the newest entry to the head file, locked against other processes."""
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
            # the entry is durable, and the next process that writes repairs the head
            log.warning("%s: not updated to the newest entry: %s", self._head_path, error)

    def _write_head(self, head: Head) -> None:
        """Replace the head file, inside a transaction that excludes other processes."""
        self._prepare(head)
        try:
            self._new_head_path.replace(self._head_path)
            _sync(self._head_path.parent)
        except OSError as error:
            raise LedgerError(f"{self._head_path}: cannot be written: {error.strerror}") from None

    def _prepare(self, head: Head) -> None:
        """Write a new head to a temporary file next to the head file.

        It is written once before the commit, so that a full disk is detected while no entry is
        written yet, and again after it over the same bytes, which needs no more disk space.
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
        """Translate SQLite's errors into ``LedgerError`` with advice."""
        try:
            yield
        except UnicodeDecodeError:  # SQLite's error message quotes a damaged table
            raise LedgerError(f"{self.path}: damaged; {_FROM_BACKUP}") from None
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            means = {
                sqlite3.SQLITE_BUSY: f"locked by another process for {self._timeout_s:g} s; if "
                "that process is training, wait for it, otherwise stop it",
                sqlite3.SQLITE_READONLY: "read only; make file and folder writable for this user",
                sqlite3.SQLITE_CANTOPEN: "cannot be opened; is the folder readable and writable "
                "for this user?",
                sqlite3.SQLITE_FULL: "the disk is full; nothing was written",
                sqlite3.SQLITE_IOERR: "cannot be read or written (disk I/O error); is the disk "
                "full, over its quota, or failing?",
                sqlite3.SQLITE_NOTADB: f"expected a ledger, found no database; {_FROM_BACKUP}",
                sqlite3.SQLITE_CORRUPT: f"damaged; {_FROM_BACKUP}",
            }
            raise LedgerError(
                f"{self.path}: {means.get(code, f'SQLite reports: {error}')}"
            ) from None


_FROM_BACKUP = "do not train with privacy until the cause is known and a backup is restored"
_TOLERANCE = timedelta(seconds=CLOCK_TOLERANCE_S)
_EPOCH = datetime.fromtimestamp(0, UTC)


def _now() -> datetime:
    return datetime.now(UTC)


def _canonical(content: Mapping[str, object]) -> str:
    """Serialise to canonical JSON: keys sorted, no spaces, ASCII, finite numbers."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hash(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _head(entries: list[Entry]) -> Head:
    return Head(entries[-1].number, entries[-1].hash) if entries else Head(0, _NO_HASH)


def _statements(script: str) -> Iterator[str]:
    """Split a script into statements, since ``executescript`` would end the transaction."""
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
