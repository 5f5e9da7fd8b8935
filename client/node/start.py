"""Starting a site: everything is looked at first, then Flower's SuperNode runs under our guard."""

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

SILENCE_S = 180.0  # without a word from the coordinator, while nothing is worked on


def start_site(
    site_file: Path, data: DataConfig, health: str, say: Callable[[str], None]
) -> NoReturn:
    """Look at everything, then connect and stay.

    Args:
        data: by which every image is read beforehand.
        health: address of the gRPC health service.

    Raises:
        ConfigError: if something fails that would keep the site from working.
    """
    from polyclinic.client.node.supernode import (  # Flower's; seconds to import
        probe_registration,
        start_supernode,
    )

    wrong = failures(report_checks(preflight(site_file, data, probe_registration, health), say))
    if wrong:
        raise ConfigError(f"{site_file}: the site does not start: {wrong}")
    start_supernode(site_file, read_site_config(site_file), health)


def site_health(site: SiteConfig, health: str) -> str:
    """What is wrong with a running site; nothing if it is well.

    A process that lives is not enough: the coordinator must have been heard lately, or the site be
    at work for it.
    """
    from polyclinic.client.node.supernode import CONTACT, read_contact

    trouble = ask_health(health)
    if trouble:
        return trouble
    contact = read_contact(site.state / CONTACT)
    if contact is None:
        return "the coordinator has not been heard yet"
    silent = (now_utc() - datetime.fromisoformat(contact.last)).total_seconds()
    if silent > SILENCE_S and not contact.working:
        return f"nothing was heard of the coordinator for {silent:.0f} s"
    return ""
