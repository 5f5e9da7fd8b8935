"""What the coordinator knows of its sites: from the SuperLink, and from the last run's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from polyclinic.configs.errors import ConfigError
from polyclinic.server.deployment.registry import Registry
from polyclinic.server.deployment.superlink import control_client, list_nodes
from polyclinic.server.runs.folder import read_lines
from polyclinic.server.runs.history import read_history
from polyclinic.server.runs.reports import TrainReport


@dataclass(frozen=True)
class SiteStatus:
    """One site; what nobody has told is None."""

    name: str
    status: str  # online, offline, registered (never seen), unregistered, expired
    since: str
    kit_until: str
    versions: dict[str, str] | None
    device: str | None
    epsilon_spent: float | None  # by its cohort so far, as it told with its last private round
    epsilon_left: float | None  # of its budget, by the same; None also of a site that has none


def server_status(kit: Path, control: int, runs: Path) -> list[SiteStatus]:
    """Every registered site.

    Raises:
        ConfigError: if the coordinator does not run here.
    """
    registry = Registry(kit)
    try:
        with control_client(control, kit / "ca.crt") as client:
            nodes = {n.public_key: n for n in list_nodes(client) if n.status != "unregistered"}
    except (httpx.HTTPError, OSError) as error:
        raise ConfigError(
            f"no coordinator answers on this machine's port {control} ({error}); in a container, "
            "call this inside it"
        ) from None
    reports, spent = last_told(runs)
    found = []
    for line, site in sorted(registry.sites().items(), key=lambda each: each[1].name):
        node = nodes.get(line)
        status = "expired" if site.problem() else node.status if node else "not yet registered"
        report = reports.get(site.name, {})
        told = spent.get(site.name)
        found.append(
            SiteStatus(
                site.name,
                status,
                node.since if node else "",
                f"{site.validity.end:%Y-%m-%d}",
                report.get("versions"),
                report.get("device"),
                told.epsilon if told else None,
                budget_left(told) if told else None,
            )
        )
    return found


def budget_left(report: TrainReport) -> float | None:
    """Epsilon that a site's cohort may still spend; None of a site that has told no budget."""
    if report.epsilon is None or report.budget is None:
        return None
    return max(report.budget - report.epsilon, 0.0)


def last_told(runs: Path) -> tuple[dict[str, dict[str, Any]], dict[str, TrainReport]]:
    """Of every site, what it last said of itself and of its last private round, over all runs."""
    reports: dict[str, dict[str, Any]] = {}
    spent: dict[str, TrainReport] = {}
    folders = [path.parent for path in runs.glob("*/progress.jsonl")]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        for event in read_lines(folder / "progress.jsonl"):
            if event.get("event") == "sites":
                reports |= event["sites"]
        history = folder / "history.jsonl"
        for entry in read_history(history) if history.is_file() else ():
            if entry.train is not None and entry.train.epsilon is not None:
                spent[entry.site] = entry.train
    return reports, spent
