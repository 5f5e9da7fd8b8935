"""What a preflight finds: each thing looked at, what was seen, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from polyclinic.configs.security.credentials import WARN, Validity

Level = Literal["OK", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    level: Level
    seen: str
    advice: str = ""  # what to do; empty where there is nothing to do


def ok(name: str, seen: str) -> Check:
    return Check(name, "OK", seen)


def check_validity(name: str, validity: Validity, now: datetime, renew: str) -> Check:
    """Whether what is valid for some time is now, and still will be in a month.

    Args:
        renew: what to do when it is not.
    """
    problem = validity.problem(now)
    if problem:
        return Check(name, "fail", f"it {problem}", renew)
    left = validity.left(now)
    if left < WARN:
        return Check(
            name, "warn", f"it expires on {validity.end:%Y-%m-%d}, in {left.days} days", renew
        )
    return ok(name, f"good until {validity.end:%Y-%m-%d}")


def report_checks(
    checks: Iterable[Check], say: Callable[[str], None], in_json: bool = False
) -> list[Check]:
    """Look at everything, and say each check as soon as it is known, or all as JSON."""
    found = []
    for check in checks:
        found.append(check)
        if not in_json:
            say("\n".join(as_lines([check])))
    if in_json:
        say(json.dumps(as_json(found), indent=2))
    return found


def failures(checks: Iterable[Check]) -> str:
    """The names of those that failed; empty if none did."""
    return ", ".join(check.name for check in checks if check.level == "fail")


def failed(checks: Sequence[Check]) -> bool:
    return any(check.level == "fail" for check in checks)


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    return {"ok": not failed(checks), "checks": [asdict(check) for check in checks]}


def as_lines(checks: Sequence[Check]) -> list[str]:
    """For a log or a terminal: one line a check, and what to do below it."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.level:<4}  {check.name:<{width}}  {check.seen}")
        if check.advice:
            lines.append(f"{'':<{width + 8}}-> {check.advice}")
    return lines
