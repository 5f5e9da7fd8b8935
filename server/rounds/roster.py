"""What the coordinator remembers of each site of a run: the site book.

Who failed how often in a row and therefore rests; how far each one's last update went. Plain
numbers, which travel in the server's state, so that a resumed run asks whom the interrupted one
would have asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass
class SiteState:
    """One site in a run."""

    failures: int = 0  # in a row: failed, late, refused
    rests_until: int = 0  # the first round in which it is asked again
    update_norm: float | None = None  # of its last good update
    steps: int | None = None  # that this update took


class SiteRoster:
    """The sites of a run by name, and how they stand.

    Args:
        after: failures in a row after which a site rests; 0 for never.
        rounds: how many rounds it rests.
    """

    def __init__(self, after: int, rounds: int) -> None:
        self.after = after
        self.rounds = rounds
        self.standings: dict[str, SiteState] = {}

    def add(self, name: str) -> None:
        self.standings.setdefault(name, SiteState())

    def eligible(self, number: int) -> list[str]:
        """Names of the sites that do not rest in a round, in order."""
        return sorted(n for n, s in self.standings.items() if s.rests_until <= number)

    def suspended(self, number: int) -> dict[str, str]:
        """By name, why a site is not asked in a round."""
        return {
            name: f"set aside after {s.failures} failures in a row, until round {s.rests_until}"
            for name, s in sorted(self.standings.items())
            if s.rests_until > number
        }

    def answered(self, name: str) -> None:
        """A site did what it was asked, or declined: it is there and well."""
        self.standings[name].failures = 0

    def failed(self, number: int, name: str) -> bool:
        """Count a failure; True if the site rests from the next round on.

        After its rest a site is tried once: if it fails again, it rests again.
        """
        standing = self.standings[name]
        standing.failures += 1
        if not self.after or standing.failures < self.after:
            return False
        standing.rests_until = number + 1 + self.rounds
        return True

    def moved(self, name: str, update_norm: float, steps: int) -> None:
        """Note a good update."""
        self.standings[name].update_norm, self.standings[name].steps = update_norm, steps

    def reference_updates(self) -> list[tuple[float, int]]:
        """The norms of all sites' last good updates, and the steps that they took."""
        return [
            (s.update_norm, s.steps)
            for s in self.standings.values()
            if s.update_norm is not None and s.steps is not None
        ]

    def state(self) -> dict[str, dict[str, Any]]:
        return {name: asdict(standing) for name, standing in sorted(self.standings.items())}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.standings = {name: SiteState(**standing) for name, standing in state.items()}


def sample(names: Sequence[str], fraction: float, seed: int, number: int) -> list[str]:
    """Draw a round's sites, the same ones whenever the same are there to be drawn from.

    Returns:
        At least one name, in order; as many as the fraction of all, rounded up.
    """
    if fraction >= 1 or not names:
        return sorted(names)
    drawn = np.random.default_rng([seed, number]).choice(
        len(names), size=math.ceil(fraction * len(names)), replace=False
    )
    return [sorted(names)[i] for i in sorted(drawn)]


def named(reasons: Mapping[str, str]) -> str:
    """Sites and their reasons as one sentence."""
    return "; ".join(f"{name}: {why}" for name, why in sorted(reasons.items()))
