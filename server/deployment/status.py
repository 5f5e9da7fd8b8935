"""Report the status of all sites, from the SuperLink and from the files of the runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.files import read_lines
from polyclinic.server.deployment.registry import Registry
from polyclinic.server.deployment.superlink import control_client, list_nodes
from polyclinic.server.runs.history import read_history
from polyclinic.server.runs.reports import TrainReport


@dataclass(frozen=True)
class SiteStatus:
    """Status of one site. Unknown values are None."""

    name: str  # name of the site
    status: str  # online, offline, registered (never seen), not yet registered, or expired
    since: str  # time of the last change of status, UTC, ISO 8601; empty if unknown
    kit_until: str  # last day on which the site's certificate is valid
    versions: dict[str, str] | None  # versions of the site's software
    device: str | None  # device that the site trains on
    epsilon_spent: float | None  # spent by the cohort, as reported in its last private round
    epsilon_left: float | None  # rest of the budget at that round; None also without a budget


def server_status(kit: Path, control: int, runs: Path) -> list[SiteStatus]:
    """List the status of all registered sites.

    Args:
        kit: folder of the coordinator's kit.
        control: control port of the running coordinator.
        runs: folder of the runs.

    Raises:
        ConfigError: if the coordinator does not run on this machine.
    """
    registry = Registry(kit)
    try:
        with control_client(control, kit / "ca.crt") as client:
            nodes = {n.public_key: n for n in list_nodes(client) if n.status != "unregistered"}
    except (httpx.HTTPError, OSError) as error:
        raise ConfigError(
            f"no coordinator answers on port {control} of this machine ({error}); if it runs in a "
            "container, use this command inside the container"
        ) from None
    reports, spent = last_reports(runs)
    found = []
    for line, site in sorted(registry.sites().items(), key=lambda each: each[1].name):
        node = nodes.get(line)
        status = "expired" if site.problem() else node.status if node else "not yet registered"
        report = reports.get(site.name, {})
        last_private = spent.get(site.name)
        found.append(
            SiteStatus(
                site.name,
                status,
                node.since if node else "",
                f"{site.validity.end:%Y-%m-%d}",
                report.get("versions"),
                report.get("device"),
                last_private.epsilon if last_private else None,
                budget_left(last_private) if last_private else None,
            )
        )
    return found


def budget_left(report: TrainReport) -> float | None:
    """Return the epsilon that a site's cohort may still spend; None if it reported no budget."""
    if report.epsilon is None or report.budget is None:
        return None
    return max(report.budget - report.epsilon, 0.0)


def last_reports(runs: Path) -> tuple[dict[str, dict[str, Any]], dict[str, TrainReport]]:
    """Find the latest reports of every site in the folders of all runs.

    Returns:
        The last description of each site, and the report of its last private round, both by name.
    """
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
