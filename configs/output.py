"""What commands print: results to stdout, messages to stderr, through one place.

Tables never cut a number or a name: they fit 80 columns where their content does, and are as wide
as their content where it does not. JSON results are one object with ``schema_version`` first and
keys in snake_case.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

SCHEMA_VERSION = 1  # of every JSON result; higher when a key is renamed, removed or means another
WIDTH = 80  # columns where no terminal says otherwise


def group(help: str = "", **options: Any) -> typer.Typer:  # noqa: ANN401
    """Create a group of commands with help texts that are reflowed to the terminal's width."""
    return typer.Typer(help=help or None, rich_markup_mode="markdown", **options)


def messages() -> Console:
    """Console for messages to people: progress, warnings, where something was written."""
    return Console(stderr=True, markup=False, highlight=False)


def results() -> Console:
    """Console for results as text."""
    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, markup=False, highlight=False)


def print_result(text: str) -> None:
    """Print a line of a result as it is, without wrapping."""
    sys.stdout.write(f"{text}\n")


def print_message(text: str) -> None:
    """Print a line for people to stderr, without wrapping."""
    sys.stderr.write(f"{text}\n")


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object with the schema's version.

    Args:
        content: the result. Infinity becomes the text ``infinity``, which JSON has no number for.
    """
    document = {"schema_version": SCHEMA_VERSION, **content}
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False) + "\n")


def print_json_line(content: Mapping[str, Any]) -> None:
    """Print one object of a sequence on one line (JSON Lines)."""
    document = {"schema_version": SCHEMA_VERSION, **content}
    sys.stdout.write(json.dumps(_finite(document), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, float) and math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def new_table(
    names: Sequence[str], numbers: Sequence[str] = (), title: str = "", caption: str = ""
) -> Table:
    """Create a compact table.

    Args:
        names: headings of the first columns, which hold text and stand left.
        numbers: headings of the columns after them, which stand right.
        title: above the table, empty for none.
        caption: below the table, empty for none.
    """
    table = Table(
        title=title or None,
        title_justify="left",
        caption=caption or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
        show_edge=False,
    )
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table with every cell whole, wider than the terminal if its content is."""
    console = console or results()
    unlimited = console.options.update(max_width=100_000)
    needed = Measurement.get(console, unlimited, table).maximum
    if needed > console.width:
        console = Console(file=console.file, width=needed, markup=False, highlight=False)
    console.print(table)
