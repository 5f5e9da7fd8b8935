"""Results of preflight checks: what was checked, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from polyclinic.configs.output import print_json
from polyclinic.configs.security.credentials import WARN, Validity

Level = Literal["OK", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str  # subject of the check
    level: Level  # result
    seen: str  # what was found
    advice: str = ""  # what to do; empty: nothing


def ok(name: str, seen: str) -> Check:
    """Return the result of a check that passed."""
    return Check(name, "OK", seen)


def check_validity(name: str, validity: Validity, now: datetime, renew: str) -> Check:
    """Check that something is valid now and will be for another 30 days.

    Args:
        name: subject of the check.
        validity: when it is valid.
        now: current time.
        renew: advice for something that is invalid or expires soon.
    """
    problem = validity.problem(now)
    if problem:
        return Check(name, "fail", f"it {problem}", renew)
    left = validity.left(now)
    if left < WARN:
        return Check(
            name, "warn", f"it expires on {validity.end:%Y-%m-%d}, in {left.days} days", renew
        )
    return ok(name, f"valid until {validity.end:%Y-%m-%d}")


def report_checks(
    checks: Iterable[Check], say: Callable[[str], None], in_json: bool = False
) -> list[Check]:
    """Run checks and print each result as soon as it is known, or all results as JSON.

    Args:
        checks: the checks, which run as they are iterated over.
        say: prints a text.
        in_json: print all results at the end as one JSON object.

    Returns:
        All results.
    """
    found = []
    for check in checks:
        found.append(check)
        if not in_json:
            say("\n".join(as_lines([check])))
    if in_json:
        print_json(as_json(found))
    return found


def failures(checks: Iterable[Check]) -> str:
    """Join the names of failed checks with commas; empty if none failed."""
    return ", ".join(check.name for check in checks if check.level == "fail")


def failed(checks: Sequence[Check]) -> bool:
    """Return whether any check failed."""
    return any(check.level == "fail" for check in checks)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Convert results to a JSON object."""
    return {"ok": not failed(checks), "checks": [asdict(check) for check in checks]}


def as_lines(checks: Sequence[Check]) -> list[str]:
    """Format results for a log or a terminal: one line per check, with the advice below it."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.level:<4}  {check.name:<{width}}  {check.seen}")
        if check.advice:
            lines.append(f"{'':<{width + 8}}-> {check.advice}")
    return lines
