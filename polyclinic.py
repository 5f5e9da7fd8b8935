"""The package ``polyclinic``; its sub-packages are the folders next to this module.

``client``, ``server``, ``configs``, ``mtl_model`` and ``simulation`` are too common as top-level
names: a ``client.py`` in the working folder or in another wheel could be imported instead. They are
imported as ``polyclinic.client`` and so on. This works the same way in a checkout, in an app
unpacked by Flower and in a wheel (docs/decisions.md).
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

__path__ = [os.path.dirname(os.path.realpath(__file__))]
if __spec__ is not None:  # None if this file is run as a script
    __spec__.submodule_search_locations = __path__


@functools.cache
def command_line() -> typer.Typer:
    """Build the command line from the command groups of the packages."""
    import typer

    from polyclinic.client import commands as client_commands
    from polyclinic.configs import VERSION
    from polyclinic.configs.output import group, print_result
    from polyclinic.server import commands as server_commands
    from polyclinic.simulation import commands as simulation_commands

    app = group(
        "Train one segmentation and classification network at several hospitals; "
        "images never leave their site.",
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
            print_result(VERSION)
            raise typer.Exit

    return app


def main() -> None:
    """Run the command line; user errors print one line and end with exit status 2."""
    from polyclinic.client.data.manifest import DataError
    from polyclinic.client.ledger.hash_chain import LedgerError
    from polyclinic.configs.errors import ConfigError
    from polyclinic.configs.model_metadata import ModelFileError
    from polyclinic.configs.output import print_message

    try:
        command_line()()
    except (ConfigError, DataError, ModelFileError) as error:
        print_message(f"error: {error}")
        sys.exit(2)
    except (OSError, LedgerError) as error:
        print_message(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
