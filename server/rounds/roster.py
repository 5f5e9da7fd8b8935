"""Keep the coordinator's record of each site of a run: its failures and its last update.

The record consists of plain numbers and is saved with the server's state, so that a resumed run
asks the same sites that the interrupted run would have asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass
class SiteState:
    """The state of one site in a run."""

    failures: int = 0  # consecutive phases with the outcome failed, late or refused
    rests_until: int = 0  # first round in which a suspended site is asked again; 0: not suspended
    update_norm: float | None = None  # L2 norm of its last accepted update; None: no update yet
    steps: int | None = None  # number of training steps of that update


class SiteRoster:
    """The sites of a run, by name, with their states.

    Args:
        after: number of consecutive failures after which a site is suspended; 0 means never.
        rounds: number of rounds for which a site is suspended.
    """

    def __init__(self, after: int, rounds: int) -> None:
        self.after = after
        self.rounds = rounds
        self.standings: dict[str, SiteState] = {}

    def add(self, name: str) -> None:
        """Add a site, unless it is already known."""
        self.standings.setdefault(name, SiteState())

    def eligible(self, number: int) -> list[str]:
        """Return the sorted names of the sites that are not suspended in a round."""
        return sorted(n for n, s in self.standings.items() if s.rests_until <= number)

    def suspended(self, number: int) -> dict[str, str]:
        """Return the suspended sites of a round, with the reasons."""
        return {
            name: f"suspended after {s.failures} consecutive failures, until round {s.rests_until}"
            for name, s in sorted(self.standings.items())
            if s.rests_until > number
        }

    def answered(self, name: str) -> None:
        """Record that a site answered or declined, which resets its failures."""
        self.standings[name].failures = 0

    def failed(self, number: int, name: str) -> bool:
        """Record a failure of a site.

        After its suspension a site gets one attempt: if it fails again, it is suspended again.

        Returns:
            True if the site is suspended from the next round.
        """
        standing = self.standings[name]
        standing.failures += 1
        if not self.after or standing.failures < self.after:
            return False
        standing.rests_until = number + 1 + self.rounds
        return True

    def moved(self, name: str, update_norm: float, steps: int) -> None:
        """Record the norm and the number of steps of an accepted update."""
        self.standings[name].update_norm, self.standings[name].steps = update_norm, steps

    def reference_updates(self) -> list[tuple[float, int]]:
        """Return the norm and the number of steps of every site's last accepted update."""
        return [
            (s.update_norm, s.steps)
            for s in self.standings.values()
            if s.update_norm is not None and s.steps is not None
        ]

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the states of all sites for a checkpoint."""
        return {name: asdict(standing) for name, standing in sorted(self.standings.items())}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the states that ``state`` returned."""
        self.standings = {name: SiteState(**standing) for name, standing in state.items()}


def sample(names: Sequence[str], fraction: float, seed: int, number: int) -> list[str]:
    """Draw the sites of a round; the same arguments always give the same sites.

    Args:
        names: the sites to draw from.
        fraction: fraction of the sites to draw; the number is rounded up.
        seed: the run's seed.
        number: the round.

    Returns:
        Sorted names, at least one if ``names`` is not empty.
    """
    if fraction >= 1 or not names:
        return sorted(names)
    drawn = np.random.default_rng([seed, number]).choice(
        len(names), size=math.ceil(fraction * len(names)), replace=False
    )
    return [sorted(names)[i] for i in sorted(drawn)]


def named(reasons: Mapping[str, str]) -> str:
    """Format sites and their reasons as one line of text."""
    return "; ".join(f"{name}: {why}" for name, why in sorted(reasons.items()))
