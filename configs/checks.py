"""What a preflight finds: each thing looked at, what was seen, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
