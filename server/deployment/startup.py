"""Starting the coordinator: everything is looked at first, then the SuperLink runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from polyclinic.configs import VERSION
from polyclinic.configs.diagnostics.checks import Check, check_validity, failures, ok, report_checks
from polyclinic.configs.diagnostics.health import ask_health
from polyclinic.configs.diagnostics.machine import (
    check_address,
    check_disk,
    check_memory,
    check_port,
    check_shared_memory,
    check_writable,
)
from polyclinic.configs.diagnostics.network import ask_about, check_proxy, resolve
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

DATABASE = "state.db"


def preflight(
    kit: Path, state: Path, host: str, control: int, health: str, running: bool
) -> Iterator[Check]:
    """Look at everything that keeps a coordinator from working.

    Args:
        running: whether it runs already, and its ports are its own.
    """
    try:
        federation = read_federation(kit / FEDERATION)
    except ConfigError as error:
        advice = "give the kit that polyclinic server provision made (kits/server)"
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
    if found.level == "fail":  # sites may know a name that the server itself does not
        found = Check("DNS", "warn", found.seen, "see that the sites can resolve it")
    yield found
    yield check_proxy("127.0.0.1")
    if running:
        return
    public = federation.server.port
    yield check_port("public port", host, public)
    if control == public:
        seen = f"{control} is the public port too"
        yield Check("control port", "fail", seen, "give another --control")
    else:
        yield check_port("control port", "127.0.0.1", control)
    # Flower's health service shares a port that somebody listens on already, without a word
    taken = {str(public): "the public port", str(control): "the control port"}
    if of := taken.get(health.rpartition(":")[2]):
        advice = "give another --health, or POLYCLINIC_HEALTH"
        yield Check("health port", "fail", f"{health}: the number is {of}'s too", advice)
    else:
        yield check_address("health port", health)


def _certificates(kit: Path, federation: FederationConfig) -> Iterator[Check]:
    renew = "polyclinic server provision federation.yaml --out kits --renew server"
    try:
        authority = read_certificate(kit / "ca.crt")
        certificate = read_certificate(kit / "server.crt")
        key = read_private_key(kit / "server.key")
        sites = Registry(kit).sites()
    except ConfigError as error:
        advice = "copy the kit again, with its permissions; it must belong to who runs this"
        yield Check("certificate", "fail", str(error), advice)
        return
    fits = public_line(key.public_key()) == public_line(key_of(certificate))
    if not fits or not vouched_for(certificate, authority):
        yield Check("certificate", "fail", "files of two kits are mixed", "copy the kit again")
        return
    now = now_utc()
    yield check_validity("certificate", validity_of(certificate), now, renew)
    late = {s.name: s for s in sites.values() if s.validity.left(now) < WARN}
    if late:
        told = ", ".join(f"{name} ({s.validity.end:%Y-%m-%d})" for name, s in late.items())
        yield Check(
            "sites",
            "warn",
            f"kits that expire soon or did: {told}",
            renew.replace("--renew server", " ".join(f"--renew {name}" for name in late)),
        )
    elif len(sites) < len(federation.sites):
        seen = f"{len(sites)} of {len(federation.sites)} sites have a certificate in the kit"
        yield Check("sites", "warn", seen, "provision again, and copy the kit")
    else:
        yield ok("sites", f"{len(sites)} registered")


def _database(path: Path) -> Check:
    """Whether the SuperLink's database is whole."""
    import sqlite3

    if not path.exists():
        return ok("database", f"{path}: not there yet")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            ((found,),) = database.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        advice = "stop, and restore it from a backup (polyclinic server restore)"
        return Check("database", "fail", f"{path}: {found}", advice)
    return ok("database", f"{path}: whole")


def start_server(
    kit: Path, state: Path, host: str, control: int, health: str, say: Callable[[str], None]
) -> NoReturn:
    """Look at everything, then run until stopped.

    Raises:
        ConfigError: if something fails that would keep the coordinator from working.
    """
    kit, state = kit.resolve(), state.resolve()
    looks = preflight(kit, state, host, control, health, running=False)
    wrong = failures(report_checks(looks, say))
    if wrong:
        raise ConfigError(f"{kit}: the coordinator does not start: {wrong}")

    from polyclinic.server.deployment.superlink import (  # Flower's; seconds
        Credentials,
        Endpoints,
        start_superlink,
    )

    files = Credentials(kit / "ca.crt", kit / "server.crt", kit / "server.key")
    port = read_federation(kit / FEDERATION).server.port
    registry = Registry(kit)
    start_superlink(Endpoints(host, port, control, health, registry), files, state)


def server_health(kit: Path, health: str) -> str:
    """What is wrong with a running coordinator, seen through the door that sites use."""
    trouble = ask_health(health)
    if trouble:
        return trouble
    port = read_federation(kit / FEDERATION).server.port
    try:
        ask_about("127.0.0.1", port, kit / "ca.crt")
    except OSError as error:
        return f"the public port {port}: {error}"
    return ""
