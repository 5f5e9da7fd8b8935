"""The package ``polyclinic``: this module, and as its sub-packages the folders next to it.

``client``, ``server``, ``configs``, ``mtl_model`` and ``simulation`` are too common as names to
import at top level: a ``client.py`` in the working folder, or another wheel, would be loaded
instead. They are imported as ``polyclinic.client`` and so on, from a checkout, from an app that
Flower unpacked and from a wheel alike (docs/decisions.md).
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__path__ = [os.path.dirname(os.path.realpath(__file__))]
if __spec__ is not None:  # None where this file is run as a script
    __spec__.submodule_search_locations = __path__


@functools.cache
def command_line() -> typer.Typer:
    """Build the command line from the command groups of the packages."""
    import typer

    from polyclinic.client import commands as client_commands
    from polyclinic.configs import VERSION
    from polyclinic.server import commands as server_commands
    from polyclinic.simulation import commands as simulation_commands

    app = typer.Typer(
        help="Hospitals train one network together; no image leaves its hospital.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.add_typer(simulation_commands.app)
    app.add_typer(server_commands.app)
    app.add_typer(client_commands.app)

    @app.callback(invoke_without_command=True)
    def about(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        if version:
            print(VERSION)
            raise typer.Exit

    return app


def main() -> None:
    """Run the command line; user errors print one line and end with exit status 2."""
    from polyclinic.client.data.manifest import DataError
    from polyclinic.client.ledger.hash_chain import LedgerError
    from polyclinic.configs.errors import ConfigError
    from polyclinic.configs.passport import ModelFileError

    try:
        command_line()()
    except (ConfigError, DataError, ModelFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, LedgerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
