"""Start a site: run all checks, then Flower's SuperNode with the release check."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from polyclinic.client.node.preflight import preflight
from polyclinic.configs.diagnostics.checks import failures, report_checks
from polyclinic.configs.diagnostics.health import ask_health
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.site import SiteConfig, read_site_config
from polyclinic.configs.security.credentials import now_utc

SILENCE_S = 180.0  # an idle site is unhealthy after this many seconds without contact


def start_site(
    site_file: Path, data: DataConfig, health: str, say: Callable[[str], None]
) -> NoReturn:
    """Run all checks, then connect to the coordinator and serve it until stopped.

    Args:
        site_file: the site's ``site.yaml``.
        data: settings to read every image with during the checks.
        health: address of the gRPC health service.
        say: prints one line.

    Raises:
        ConfigError: if a check fails.
    """
    from polyclinic.client.node.supernode import (  # Flower takes seconds to import
        probe_registration,
        start_supernode,
    )

    wrong = failures(report_checks(preflight(site_file, data, probe_registration, health), say))
    if wrong:
        raise ConfigError(f"{site_file}: the site does not start: {wrong}")
    start_supernode(site_file, read_site_config(site_file), health)


def site_health(site: SiteConfig, health: str) -> str:
    """Return what is wrong with a running site; an empty string if it is healthy.

    A running process is not enough: the site must have been in contact with the coordinator
    recently, or be working on a task.

    Args:
        site: the site's settings.
        health: address of the gRPC health service.
    """
    from polyclinic.client.node.supernode import CONTACT, read_contact

    trouble = ask_health(health)
    if trouble:
        return trouble
    contact = read_contact(site.state / CONTACT)
    if contact is None:
        return "no contact with the coordinator yet"
    silent = (now_utc() - datetime.fromisoformat(contact.last)).total_seconds()
    if silent > SILENCE_S and not contact.working:
        return f"no contact with the coordinator for {silent:.0f} s"
    return ""
