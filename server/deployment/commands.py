"""Commands of ``polyclinic server``: kits, the running coordinator, its days."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyclinic.configs.diagnostics.checks import failed, report_checks
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.ports import CONTROL, SERVER_HEALTH
from polyclinic.configs.schema.federation import read_federation

if TYPE_CHECKING:
    from polyclinic.server.deployment.status import SiteStatus  # brings Flower's client, seconds

coordinator = typer.Typer(help="Look after a coordinator.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]
KitOption = Annotated[Path, typer.Option("--kit", help="The server's kit.")]
StateOption = Annotated[Path, typer.Option("--state", help="Folder for what must last.")]
HostOption = Annotated[str, typer.Option("--host", help="Where sites come in.")]
ControlOption = Annotated[
    int, typer.Option("--control", help="Port on loopback, for the coordinator's own commands.")
]
HealthOption = Annotated[
    str,
    typer.Option("--health", envvar="POLYCLINIC_HEALTH", help="Address of the health service."),
]
KIT, STATE = Path("/etc/polyclinic"), Path("/var/lib/polyclinic")


@coordinator.command()
def provision(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION_YAML")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the kits.")] = Path("kits"),
    renew: Annotated[
        list[str] | None,
        typer.Option("--renew", metavar="NAME", help="New key and certificate: a site or server."),
    ] = None,
) -> None:
    """Make a kit for the server and one for each site, or bring those that are there up to date.

    Sites that are no longer in the file lose their access within seconds where the server runs
    with this kit. Called again with nothing to do, it changes nothing.
    """
    from polyclinic.server.deployment.provision import expiries, soon
    from polyclinic.server.deployment.provision import provision as make

    changes = make(read_federation(federation), out, renew or ())
    for change in changes:
        typer.echo(f"{change.what}: {change.did}")
    typer.echo(f"{out.absolute()}: {'up to date' if changes else 'nothing had to be changed'}")
    for each in expiries(out):
        if soon(each):
            typer.echo(f"warning: {each.what} expires on {each.end}, in {each.days} days", err=True)


@coordinator.command()
def certificates(
    kits: Annotated[Path, typer.Argument(metavar="KITS")] = Path("kits"),
    as_json: JsonOption = False,
) -> None:
    """Show until when the authority, the server and every site hold.

    Exit status: 1 if anything has expired or will in 30 days.
    """
    from polyclinic.server.deployment.provision import expiries, soon

    found = expiries(kits)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=2))
    else:
        width = max(len(each.what) for each in found)
        for each in found:
            word = "EXPIRED" if each.days < 0 else "renew" if soon(each) else "OK"
            typer.echo(
                f"{word:<7}  {each.what:<{width}}  {each.end}  {each.days} days  "
                f"key {each.fingerprint}"
            )
    if any(soon(each) for each in found):
        raise typer.Exit(1)


@coordinator.command()
def sign(
    fab: Annotated[Path, typer.Argument(metavar="RELEASE.fab")],
    key: Annotated[Path, typer.Option("--key", help="Ed25519 private key (ssh-keygen).")],
) -> None:
    """Sign a release for sites that have a release-signer; writes RELEASE.fab.sig."""
    from polyclinic.configs.security.release import read_release
    from polyclinic.configs.security.release import sign as sign_release

    _, release = read_release(fab)
    target = Path(f"{fab}.sig")
    target.write_text(sign_release(release, key) + "\n", encoding="utf-8")
    typer.echo(f"{target}: of release {release.digest}")


@coordinator.command()
def start(
    kit: KitOption = KIT,
    state: StateOption = STATE,
    host: HostOption = "0.0.0.0",
    control: ControlOption = CONTROL,
    health: HealthOption = SERVER_HEALTH,
) -> None:
    """Run the coordinator until it is stopped.

    Looks at everything first, as preflight does. The sites of the kit are registered; when the kit
    changes, so are they. Runs are started on this machine: flwr run APP polyclinic, with FLWR_HOME
    in the state.
    """
    from polyclinic.server.deployment.startup import start_server

    start_server(kit, state, host, control, health, typer.echo)


@coordinator.command()
def preflight(
    kit: KitOption = KIT,
    state: StateOption = STATE,
    host: HostOption = "0.0.0.0",
    control: ControlOption = CONTROL,
    health: HealthOption = SERVER_HEALTH,
    running: Annotated[
        bool, typer.Option("--running", help="The coordinator runs: leave its ports alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Look at everything that keeps a coordinator from working, and say what to do.

    Exit status: 1 if anything fails.
    """
    from polyclinic.server.deployment.startup import preflight as look

    looks = look(kit.resolve(), state.resolve(), host, control, health, running)
    if failed(report_checks(looks, typer.echo, as_json)):
        raise typer.Exit(1)


@coordinator.command()
def health(kit: KitOption = KIT, health: HealthOption = SERVER_HEALTH) -> None:
    """Whether the coordinator runs and sites can come in. Exit status: 1 if not."""
    from polyclinic.server.deployment.startup import server_health

    trouble = server_health(kit, health)
    typer.echo(trouble or "well")
    if trouble:
        raise typer.Exit(1)


@coordinator.command()
def status(
    kit: KitOption = KIT,
    state: StateOption = STATE,
    control: ControlOption = CONTROL,
    as_json: JsonOption = False,
) -> None:
    """Show every site: connected or not, since when, its versions, its budget spent and left.

    Versions and budgets are as sites told them in the runs in STATE/runs.
    """
    from polyclinic.server.deployment.status import server_status

    found = server_status(kit.resolve(), control, state / "runs")
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in (
        "site",
        "status",
        "since (UTC)",
        "kit until",
        "versions",
        "device",
        "epsilon spent",
    ):
        table.add_column(column)
    for each in found:
        told: list[Any] = [
            each.versions and ", ".join(f"{k} {v}" for k, v in each.versions.items())
        ]
        told += [each.device, _spent(each)]
        cells = [each.name, each.status, each.since[:19], each.kit_until, *told]
        table.add_row(*("-" if cell in (None, "") else str(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(table)


def _spent(site: SiteStatus) -> str | None:
    if site.epsilon_spent is None:
        return None
    left = f", {site.epsilon_left:.2f} left" if site.epsilon_left is not None else ""
    return f"{site.epsilon_spent:.2f}{left}"


@coordinator.command()
def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE.tar.gz")], state: StateOption = STATE
) -> None:
    """Write the SuperLink's database and every run into one archive; it may go on running.

    The kit, with its private key, is not in it.
    """
    from polyclinic.server.deployment.backup import back_up

    typer.echo(f"{target}: {back_up(state, target) / 1e6:.1f} MB")


@coordinator.command()
def restore(
    archive: Annotated[Path, typer.Argument(metavar="FILE.tar.gz")], state: StateOption = STATE
) -> None:
    """Lay a backup down in an empty state folder."""
    from polyclinic.server.deployment.backup import restore as lay_down

    if not archive.is_file():
        raise ConfigError(f"{archive}: no such file")
    lay_down(archive, state)
    typer.echo(f"{state}: restored from {archive}")
