"""The site's outgoing log: one entry per reply, written before the reply is sent.

The log is an append-only file (``client.ledger.hash_chain``) that proves later what was sent. It
holds every value of a reply except the weights, of which it keeps size and hash. A reply that
cannot be recorded is not sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.client.ledger.hash_chain import HashChain

OUTGOING = "outgoing.db"  # file name in a site's state folder


@dataclass(frozen=True)
class Sent:
    """The contents of one reply, as recorded in the outgoing log."""

    kind: str  # message type: query.describe, train or evaluate
    outcome: str  # answered, declined or refused
    run: str
    round: int
    release: str  # digest of the code that produced the reply
    told: Mapping[str, Any]  # all values except arrays, in plain text
    arrays: Mapping[str, bytes]  # arrays by name, as serialised for sending
    epsilon_before: float | None = None  # spent by the site's cohort; None without privacy
    epsilon_after: float | None = None

    @property
    def bytes(self) -> int:
        return sum(map(len, self.arrays.values()))

    @property
    def sha256(self) -> str | None:
        """SHA-256 over names and contents of all arrays in the order of names; None if empty."""
        if not self.arrays:
            return None
        whole = hashlib.sha256()
        for name in sorted(self.arrays):
            whole.update(f"{name}\0{len(self.arrays[name])}\0".encode())
            whole.update(self.arrays[name])
        return whole.hexdigest()


def write_down(state: Path, sent: Sent) -> None:
    """Append a reply to the site's outgoing log.

    Raises:
        LedgerError: if it cannot be written; then the reply must not be sent.
    """
    with HashChain(state / OUTGOING) as chain, chain.transaction():
        chain.append(
            "sent",
            message=sent.kind,
            outcome=sent.outcome,
            run=sent.run,
            round=sent.round,
            release=sent.release,
            bytes=sent.bytes,
            sha256=sent.sha256,
            told=dict(sent.told),
            epsilon_before=sent.epsilon_before,
            epsilon_after=sent.epsilon_after,
        )


def read_outgoing(state: Path) -> list[Mapping[str, Any]]:
    """Read all sent replies with their times, oldest first; empty if there is no log yet.

    Raises:
        LedgerTampered: if the contents differ from what was written.
        LedgerError: if the log cannot be read.
    """
    path = state / OUTGOING
    if not path.exists() and not path.with_name(f"{path.name}.head").exists():
        return []
    with HashChain(path, read_only=True) as chain:
        return [entry.content for entry in chain.entries]
