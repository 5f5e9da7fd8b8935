"""Releases that a site has approved: nothing else that a coordinator ships is run there.

``client.node.supernode`` asks here before any of a release's code is unpacked; that is outside the
release, so that a release cannot approve itself.

``releases/`` in the site's state keeps a copy of every approved release, to show what the next
one changes, and ``approvals.jsonl``, one line for each approval and withdrawal.
"""

from __future__ import annotations

import difflib
import getpass
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.security.credentials import now_utc
from polyclinic.configs.security.release import Release, open_release

FOLDER = "releases"


@dataclass(frozen=True)
class Approval:
    """One line of what a site decided."""

    time: str
    digest: str
    version: str
    action: Literal["approved", "withdrawn"]
    by: str


@dataclass(frozen=True)
class FileChange:
    """What a release does to one file of the one before."""

    name: str
    kind: Literal["new", "changed", "gone"]
    lines: tuple[str, ...]  # a unified diff, safe to print


def changes(before: Release | None, after: Release) -> Iterator[FileChange]:
    """What a release changes, file by file; all of it is new where there is none before."""
    old = before.files if before else {}
    for name in sorted({*old, *after.files}):
        if name.startswith(".info/") or old.get(name) == after.files.get(name):
            continue  # .info lists the other files
        kind: Literal["new", "changed", "gone"] = "changed"
        if name not in old:
            kind = "new"
        elif name not in after.files:
            kind = "gone"
        yield FileChange(name, kind, tuple(_diff(old.get(name, b""), after.files.get(name, b""))))


def _diff(before: bytes, after: bytes) -> Iterator[str]:
    try:
        old, new = before.decode().splitlines(), after.decode().splitlines()
    except UnicodeDecodeError:
        yield f"{len(after)} bytes that are no text and cannot be shown"
        return
    for line in difflib.unified_diff(old, new, "before", "after", lineterm=""):
        yield visible(line)


def visible(text: str) -> str:
    """A text as it is, with characters that could hide another written out.

    Control codes would let a release paint over its own difference on a terminal, and codes for
    the direction of writing show code in another order than it runs.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Approvals:
    """A site's decisions, on its own disk.

    Args:
        state: the site's state folder.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER
        self.log = self.folder / "approvals.jsonl"

    def approve(self, content: bytes) -> Approval:
        """Allow a release, and keep a copy of it.

        Raises:
            ConfigError: if it is no packed app.
        """
        release = open_release(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        copy = self.copy_of(release.digest)
        part = copy.with_suffix(".part")
        part.write_bytes(content)
        part.replace(copy)
        return self._decide(release.digest, release.version, "approved")

    def withdraw(self, digest: str) -> Approval:
        """Take an approval back; what runs of it ends its message, and gets no other.

        Args:
            digest: or its first digits, eight at least.

        Raises:
            ConfigError: if no approved release has it.
        """
        found = [a for a in self.approved().values() if a.digest.startswith(digest)]
        if len(digest) < 8 or len(found) != 1:
            raise ConfigError(
                f"{digest}: expected the digest of an approved release, of "
                f"{', '.join(each[:12] for each in self.approved()) or 'which there is none'}"
            )
        return self._decide(found[0].digest, found[0].version, "withdrawn")

    def approved(self) -> dict[str, Approval]:
        """What may run, by digest, the latest approval last.

        Raises:
            ConfigError: if the file of decisions is damaged.
        """
        standing: dict[str, Approval] = {}
        for decision in self.decisions():
            standing.pop(decision.digest, None)
            if decision.action == "approved":
                standing[decision.digest] = decision
        return standing

    def decisions(self) -> list[Approval]:
        """Everything that was decided, oldest first.

        Raises:
            ConfigError: if the file is damaged.
        """
        if not self.log.exists():
            return []
        try:
            lines = self.log.read_text(encoding="utf-8").splitlines()
            return [Approval(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.log}: is damaged ({error}); no release is allowed") from None

    def latest(self) -> Release | None:
        """The release approved last of those that are still allowed."""
        for digest in reversed(self.approved()):
            if self.copy_of(digest).is_file():
                return open_release(self.copy_of(digest).read_bytes())
        return None

    def copy_of(self, digest: str) -> Path:
        return self.folder / f"{digest}.fab"

    def _decide(
        self, digest: str, version: str, action: Literal["approved", "withdrawn"]
    ) -> Approval:
        now = now_utc().isoformat(timespec="seconds")
        decision = Approval(now, digest, version, action, _user())
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(decision)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return decision


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        return f"uid {os.getuid()}"
