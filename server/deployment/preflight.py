"""Preflight checks of the coordinator: its kit, its state folder, the machine and the ports."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from polyclinic.configs import VERSION
from polyclinic.configs.diagnostics.checks import Check, check_validity, ok
from polyclinic.configs.diagnostics.machine import (
    check_address,
    check_disk,
    check_memory,
    check_port,
    check_shared_memory,
    check_writable,
)
from polyclinic.configs.diagnostics.network import check_proxy, resolve
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.federation import FEDERATION, FederationConfig, read_federation
from polyclinic.configs.security.credentials import (
    WARN,
    key_of,
    now_utc,
    public_line,
    read_certificate,
    read_private_key,
    validity_of,
    vouched_for,
)
from polyclinic.server.deployment.registry import Registry

DATABASE = "state.db"  # the SuperLink's database in the state folder


def preflight(
    kit: Path, state: Path, host: str, control: int, health: str, running: bool
) -> Iterator[Check]:
    """Check everything that can keep a coordinator from working.

    Args:
        kit: folder of the coordinator's kit.
        state: folder of its database, logs and runs.
        host: address of the public port.
        control: control port on loopback.
        health: address of the health service.
        running: whether the coordinator is running, so that its ports are in use.
    """
    try:
        federation = read_federation(kit / FEDERATION)
    except ConfigError as error:
        advice = "use the kit that polyclinic server provision made (kits/server)"
        yield Check("kit", "fail", str(error), advice)
        return
    yield ok("kit", f"{kit}: federation {federation.name}, {len(federation.sites)} sites")
    yield ok("versions", f"polyclinic {VERSION}, flwr {version('flwr')}")
    yield from _certificates(kit, federation)
    yield check_writable("state", state)
    yield check_disk("disk", state)
    yield check_memory()
    yield check_shared_memory()
    yield _database(state / DATABASE)
    found = resolve(federation.server.address, federation.server.port)
    if found.level == "fail":  # sites may be able to resolve a name that the server cannot
        found = Check("DNS", "warn", found.seen, "make sure that the sites can resolve it")
    yield found
    yield check_proxy("127.0.0.1")
    if running:
        return
    public = federation.server.port
    yield check_port("public port", host, public)
    if control == public:
        seen = f"{control} is also the public port"
        yield Check("control port", "fail", seen, "use another --control")
    else:
        yield check_port("control port", "127.0.0.1", control)
    # If another process listens on its port, Flower's health service shares the port silently.
    taken = {str(public): "the public port", str(control): "the control port"}
    if other := taken.get(health.rpartition(":")[2]):
        advice = "use another --health or POLYCLINIC_HEALTH"
        yield Check("health port", "fail", f"{health}: its number is also {other}", advice)
    else:
        yield check_address("health port", health)


def _certificates(kit: Path, federation: FederationConfig) -> Iterator[Check]:
    """Check the certificates and keys of the server and of the sites in the kit."""
    renew = "polyclinic server provision federation.yaml --out kits --renew server"
    try:
        authority = read_certificate(kit / "ca.crt")
        certificate = read_certificate(kit / "server.crt")
        key = read_private_key(kit / "server.key")
        sites = Registry(kit).sites()
    except ConfigError as error:
        advice = "copy the kit again, with its permissions; the user that runs this must own it"
        yield Check("certificate", "fail", str(error), advice)
        return
    fits = public_line(key.public_key()) == public_line(key_of(certificate))
    if not fits or not vouched_for(certificate, authority):
        seen = "the kit contains files of two different kits"
        yield Check("certificate", "fail", seen, "copy the kit again")
        return
    now = now_utc()
    yield check_validity("certificate", validity_of(certificate), now, renew)
    late = {s.name: s for s in sites.values() if s.validity.left(now) < WARN}
    if late:
        names = ", ".join(f"{name} ({s.validity.end:%Y-%m-%d})" for name, s in late.items())
        yield Check(
            "sites",
            "warn",
            f"kits that have expired or expire soon: {names}",
            renew.replace("--renew server", " ".join(f"--renew {name}" for name in late)),
        )
    elif len(sites) < len(federation.sites):
        seen = f"{len(sites)} of {len(federation.sites)} sites have a certificate in the kit"
        yield Check("sites", "warn", seen, "provision again, and copy the kit")
    else:
        yield ok("sites", f"{len(sites)} registered")


def _database(path: Path) -> Check:
    """Check the integrity of the SuperLink's database."""
    if not path.exists():
        return ok("database", f"{path}: does not exist yet")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            ((found,),) = database.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        advice = "stop the coordinator, and restore a backup (polyclinic server restore)"
        return Check("database", "fail", f"{path}: {found}", advice)
    return ok("database", f"{path}: intact")
