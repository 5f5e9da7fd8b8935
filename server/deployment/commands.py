"""Commands of ``polyclinic server``: kits, the running coordinator, backups."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyclinic.configs.diagnostics.checks import failed, report_checks
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import (
    group,
    new_table,
    print_json,
    print_message,
    print_result,
    print_table,
)
from polyclinic.configs.ports import CONTROL, SERVER_HEALTH
from polyclinic.configs.schema.federation import read_federation

if TYPE_CHECKING:
    from polyclinic.server.deployment.status import SiteStatus  # brings Flower's client, seconds

coordinator = group("Set up and run a coordinator.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
KitOption = Annotated[Path, typer.Option("--kit", help="Folder of the server's kit.")]
StateOption = Annotated[
    Path, typer.Option("--state", help="Folder for data that must outlast the process.")
]
HostOption = Annotated[str, typer.Option("--host", help="Address that sites connect to.")]
ControlOption = Annotated[
    int, typer.Option("--control", help="Loopback port for the coordinator's own commands.")
]
HealthOption = Annotated[
    str,
    typer.Option(
        "--health", envvar="POLYCLINIC_HEALTH", help="Address and port of the health service."
    ),
]
KIT, STATE = Path("/etc/polyclinic"), Path("/var/lib/polyclinic")


@coordinator.command()
def provision(
    federation: Annotated[
        Path,
        typer.Argument(metavar="FEDERATION_YAML", help="File that lists the server and the sites."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the kits to.")] = Path(
        "kits"
    ),
    renew: Annotated[
        list[str] | None,
        typer.Option(
            "--renew",
            metavar="NAME",
            help="Site, or `server`, that gets a new key and certificate.",
        ),
    ] = None,
) -> None:
    """Create a kit for the server and one per site, or update existing kits.

    Sites that are no longer in the file lose access within seconds if the server runs with this
    kit. Running it again without changes does nothing.
    """
    from polyclinic.server.deployment.provision import expiries, soon
    from polyclinic.server.deployment.provision import provision as make

    changes = make(read_federation(federation), out, renew or ())
    for change in changes:
        print_result(f"{change.what}: {change.did}")
    print_result(f"{out.absolute()}: {'up to date' if changes else 'nothing to change'}")
    for each in expiries(out):
        if soon(each):
            print_message(f"warning: {each.what} expires on {each.end}, in {each.days} days")


@coordinator.command()
def certificates(
    kits: Annotated[
        Path, typer.Argument(metavar="[KITS]", help="Folder that contains the kits.")
    ] = Path("kits"),
    as_json: JsonOption = False,
) -> None:
    """Show when the certificates of the authority, the server and every site expire.

    Exit status: 1 if one has expired or will within 30 days.
    """
    from polyclinic.server.deployment.provision import expiries, soon

    found = expiries(kits)
    if as_json:
        print_json({"certificates": [asdict(each) for each in found]})
    else:
        width = max(len(each.what) for each in found)
        for each in found:
            word = "EXPIRED" if each.days < 0 else "renew" if soon(each) else "OK"
            print_result(
                f"{word:<7}  {each.what:<{width}}  {each.end}  {each.days} days  "
                f"key {each.fingerprint}"
            )
    if any(soon(each) for each in found):
        raise typer.Exit(1)


@coordinator.command()
def sign(
    fab: Annotated[Path, typer.Argument(metavar="RELEASE.fab", help="A packed app (flwr build).")],
    key: Annotated[
        Path, typer.Option("--key", help="Ed25519 private key, as ssh-keygen writes it.")
    ],
) -> None:
    """Sign a release for sites with a release-signer; writes RELEASE.fab.sig."""
    from polyclinic.configs.security.release import read_release
    from polyclinic.configs.security.release import sign as sign_release

    _, release = read_release(fab)
    target = Path(f"{fab}.sig")
    target.write_text(sign_release(release, key) + "\n", encoding="utf-8")
    print_result(f"{target}: signature of release {release.digest}")


@coordinator.command()
def start(
    kit: KitOption = KIT,
    state: StateOption = STATE,
    host: HostOption = "0.0.0.0",
    control: ControlOption = CONTROL,
    health: HealthOption = SERVER_HEALTH,
) -> None:
    """Run the coordinator until it is stopped.

    Runs the checks of `preflight` first. Registers the kit's sites, and follows later changes of
    the kit. Start runs on this machine with `flwr run APP polyclinic` and FLWR_HOME set to the
    folder `flwr` in the state folder.
    """
    from polyclinic.server.deployment.startup import start_server

    start_server(kit, state, host, control, health, print_result)


@coordinator.command()
def preflight(
    kit: KitOption = KIT,
    state: StateOption = STATE,
    host: HostOption = "0.0.0.0",
    control: ControlOption = CONTROL,
    health: HealthOption = SERVER_HEALTH,
    running: Annotated[
        bool, typer.Option("--running", help="The coordinator is running: do not check its ports.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check everything a coordinator needs to run, and say how to fix what fails.

    Exit status: 1 if a check fails.
    """
    from polyclinic.server.deployment.preflight import preflight as look

    looks = look(kit.resolve(), state.resolve(), host, control, health, running)
    if failed(report_checks(looks, print_result, as_json)):
        raise typer.Exit(1)


@coordinator.command()
def health(kit: KitOption = KIT, health: HealthOption = SERVER_HEALTH) -> None:
    """Check that the coordinator is running and sites can connect. Exit status: 1 if not."""
    from polyclinic.server.deployment.startup import server_health

    trouble = server_health(kit, health)
    print_result(trouble or "healthy")
    if trouble:
        raise typer.Exit(1)


@coordinator.command()
def status(
    kit: KitOption = KIT,
    state: StateOption = STATE,
    control: ControlOption = CONTROL,
    as_json: JsonOption = False,
) -> None:
    """Show every site's connection, kit expiry, version, device and privacy budget.

    Versions and budgets are those that sites reported in the runs in STATE/runs.
    """
    from polyclinic.server.deployment.status import server_status

    found = server_status(kit.resolve(), control, state / "runs")
    if as_json:
        print_json({"sites": [asdict(each) for each in found]})
        return
    table = new_table(
        ("site", "status", "since (UTC)", "kit until", "version", "device", "epsilon spent")
    )
    for each in found:
        version = (each.versions or {}).get("polyclinic")
        cells = [each.name, each.status, each.since[:16], each.kit_until, version]
        cells += [each.device, _spent(each)]
        table.add_row(*(cell or "-" for cell in cells))
    print_table(table)


def _spent(site: SiteStatus) -> str | None:
    if site.epsilon_spent is None:
        return None
    left = f", {site.epsilon_left:.2f} left" if site.epsilon_left is not None else ""
    return f"{site.epsilon_spent:.2f}{left}"


@coordinator.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE.tar.gz", help="Archive to write.")],
    state: StateOption = STATE,
) -> None:
    """Write the SuperLink's database and every run to one archive, also while it is running.

    The kit with its private key is not included.
    """
    from polyclinic.server.deployment.backup import back_up

    print_result(f"{target}: {back_up(state, target) / 1e6:.1f} MB")


@coordinator.command()
def restore(
    archive: Annotated[
        Path, typer.Argument(metavar="FILE.tar.gz", help="Archive that `server backup` wrote.")
    ],
    state: StateOption = STATE,
) -> None:
    """Restore a backup into an empty state folder."""
    from polyclinic.server.deployment.backup import restore as lay_down

    if not archive.is_file():
        raise ConfigError(f"{archive}: no such file")
    lay_down(archive, state)
    print_result(f"{state}: restored from {archive}")
