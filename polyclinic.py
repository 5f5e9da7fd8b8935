"""The command line: mounts the rooms' command groups, nothing else."""

from __future__ import annotations

import sys

import typer

import client.commands
import server.commands
import simulation.commands
from client.chain import LedgerError
from client.manifest import DataError
from configs import VERSION
from configs.passport import ModelFileError
from configs.run import ConfigError

app = typer.Typer(
    help="Hospitals train one network together; no image leaves its hospital.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(simulation.commands.app)
app.add_typer(server.commands.app)
app.add_typer(client.commands.app)


@app.callback(invoke_without_command=True)
def about(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        print(VERSION)
        raise typer.Exit


def main() -> None:
    """Run the command line; what the user can mend ends with one line and exit status 2."""
    try:
        app()
    except (ConfigError, DataError, ModelFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, LedgerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
