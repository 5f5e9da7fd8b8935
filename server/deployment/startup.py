"""Start the coordinator after its preflight checks, and query its health."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from polyclinic.configs.diagnostics.checks import failures, report_checks
from polyclinic.configs.diagnostics.health import ask_health
from polyclinic.configs.diagnostics.network import ask_about
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.federation import FEDERATION, read_federation
from polyclinic.server.deployment.preflight import preflight
from polyclinic.server.deployment.registry import Registry


def start_server(
    kit: Path, state: Path, host: str, control: int, health: str, say: Callable[[str], None]
) -> NoReturn:
    """Run the preflight checks, then run the coordinator until it is stopped.

    Args:
        kit: folder of the coordinator's kit.
        state: folder of its database, logs and runs.
        host: address of the public port.
        control: control port on loopback.
        health: address of the health service.
        say: prints the results of the checks.

    Raises:
        ConfigError: if a check fails.
    """
    kit, state = kit.resolve(), state.resolve()
    checks = preflight(kit, state, host, control, health, running=False)
    problems = failures(report_checks(checks, say))
    if problems:
        raise ConfigError(f"{kit}: the coordinator cannot start, failed checks: {problems}")

    from polyclinic.server.deployment.superlink import (  # importing Flower takes seconds
        Credentials,
        Endpoints,
        start_superlink,
    )

    files = Credentials(kit / "ca.crt", kit / "server.crt", kit / "server.key")
    port = read_federation(kit / FEDERATION).server.port
    registry = Registry(kit)
    start_superlink(Endpoints(host, port, control, health, registry), files, state)


def server_health(kit: Path, health: str) -> str:
    """Query a running coordinator's health service and its public port.

    Args:
        kit: folder of the coordinator's kit.
        health: address of the health service.

    Returns:
        The problem, or an empty text if the coordinator is healthy.
    """
    problem = ask_health(health)
    if problem:
        return problem
    port = read_federation(kit / FEDERATION).server.port
    try:
        ask_about("127.0.0.1", port, kit / "ca.crt")
    except OSError as error:
        return f"the public port {port}: {error}"
    return ""
