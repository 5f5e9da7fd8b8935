"""What has left the site: a line for every reply, written before the reply is given to Flower.

An append-only file of the site's own (``client.ledger.hash_chain``), so that what was sent can be
shown later, to the letter but for the weights, of which size and hash are kept. A reply that cannot
be written down does not leave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.client.ledger.hash_chain import HashChain

OUTGOING = "outgoing.db"  # in a site's state folder


@dataclass(frozen=True)
class Sent:
    """A reply, as far as it can be told."""

    kind: str  # of message: query.describe, train, evaluate
    outcome: str  # answered, declined, refused
    run: str
    round: int
    release: str  # digest of the code that made it
    told: Mapping[str, Any]  # settings and numbers, in clear
    arrays: Mapping[str, bytes]  # as they travel
    epsilon_before: float | None = None  # of the site's cohort; None without privacy
    epsilon_after: float | None = None

    @property
    def bytes(self) -> int:
        return sum(map(len, self.arrays.values()))

    @property
    def sha256(self) -> str | None:
        """Over names and contents of all arrays, in the order of their names."""
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
        LedgerError: if it cannot be written; then the reply must not leave.
    """
    with HashChain(state / OUTGOING) as chain, chain.turn():
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
    """Every reply that left, oldest first, each with its time; none if there is no log yet.

    Raises:
        LedgerTampered: if the log is not what was written.
        LedgerError: if it cannot be read.
    """
    path = state / OUTGOING
    if not path.exists() and not path.with_name(f"{path.name}.head").exists():
        return []
    with HashChain(path, read_only=True) as chain:
        return [entry.content for entry in chain.entries]
