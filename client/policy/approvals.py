"""The releases that a site has approved; a site runs no other code from a coordinator.

``client.node.supernode`` checks the approval before it unpacks any code of a release. The check is
not part of the release, so a release cannot approve itself.

``releases/`` in the site's state folder holds a copy of every approved release, to show what the
next one changes, and ``approvals.jsonl`` with one line per approval or withdrawal.
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
    """One approval or withdrawal, a line of ``approvals.jsonl``."""

    time: str  # UTC, ISO 8601
    digest: str  # digest of the release
    version: str
    action: Literal["approved", "withdrawn"]
    by: str  # user name


@dataclass(frozen=True)
class FileChange:
    """The change of one file between two releases."""

    name: str
    kind: Literal["new", "changed", "gone"]
    lines: tuple[str, ...]  # unified diff, safe to print on a terminal


def changes(before: Release | None, after: Release) -> Iterator[FileChange]:
    """Compare two releases file by file; all files are new if ``before`` is None."""
    old = before.files if before else {}
    for name in sorted({*old, *after.files}):
        if name.startswith(".info/") or old.get(name) == after.files.get(name):
            continue  # .info/ only lists the other files
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
        yield f"{len(after)} bytes of binary content"
        return
    for line in difflib.unified_diff(old, new, "before", "after", lineterm=""):
        yield visible(line)


def visible(text: str) -> str:
    """Escape the characters of a text that are not printable.

    Control codes could overwrite parts of a diff on a terminal, and codes for the writing direction
    could display code in a different order than it runs.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Approvals:
    """A site's approvals and withdrawals, stored on its own disk.

    Args:
        state: the site's state folder.
    """

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER
        self.log = self.folder / "approvals.jsonl"

    def approve(self, content: bytes) -> Approval:
        """Approve a release and keep a copy of it.

        Args:
            content: the packed app.

        Raises:
            ConfigError: if the content is not a packed app.
        """
        release = open_release(content)
        self.folder.mkdir(parents=True, exist_ok=True)
        copy = self.copy_of(release.digest)
        part = copy.with_suffix(".part")
        part.write_bytes(content)
        part.replace(copy)
        return self._decide(release.digest, release.version, "approved")

    def withdraw(self, digest: str) -> Approval:
        """Withdraw an approval; a running task is finished, but no further one is accepted.

        Args:
            digest: digest of the release, or at least its first 8 digits.

        Raises:
            ConfigError: if there is no such approved release.
        """
        found = [a for a in self.approved().values() if a.digest.startswith(digest)]
        if len(digest) < 8 or len(found) != 1:
            raise ConfigError(
                f"{digest}: expected the digest of an approved release; approved are: "
                f"{', '.join(each[:12] for each in self.approved()) or 'none'}"
            )
        return self._decide(found[0].digest, found[0].version, "withdrawn")

    def approved(self) -> dict[str, Approval]:
        """Return the approved releases by digest, the latest approval last.

        Raises:
            ConfigError: if ``approvals.jsonl`` is damaged.
        """
        standing: dict[str, Approval] = {}
        for decision in self.decisions():
            standing.pop(decision.digest, None)
            if decision.action == "approved":
                standing[decision.digest] = decision
        return standing

    def decisions(self) -> list[Approval]:
        """Read all approvals and withdrawals, oldest first.

        Raises:
            ConfigError: if ``approvals.jsonl`` is damaged.
        """
        if not self.log.exists():
            return []
        try:
            lines = self.log.read_text(encoding="utf-8").splitlines()
            return [Approval(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.log}: is damaged ({error}); no release is allowed") from None

    def latest(self) -> Release | None:
        """Return the most recently approved release; None if there is none with a copy."""
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
    except (KeyError, OSError):  # the uid has no name, as in containers
        return f"uid {os.getuid()}"
