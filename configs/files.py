"""Files that are complete or absent: atomic writes, and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(
    path: Path, content: bytes, mode: int | None = None, durable: bool = True
) -> None:
    """Write a file completely or not at all.

    Args:
        path: the file; its folder exists.
        content: its content.
        mode: permissions from the first byte on; None: those that the umask leaves.
        durable: also survive a machine that stops right afterwards, at the cost of a disk sync.

    Raises:
        OSError: if the file cannot be written; an existing file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        with os.fdopen(os.open(temporary, flags, 0o666 if mode is None else mode), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append one JSON line; readers ignore an incomplete last line (``read_lines``)."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a JSON-lines file; empty if the file does not exist."""
    return read_lines_from(path, 0)[0]


def read_lines_from(path: Path, position: int) -> tuple[list[dict[str, Any]], int]:
    """Read the complete lines of a JSON-lines file from a byte position.

    Returns:
        The lines, and the position after the last of them.
    """
    if not path.exists():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        complete, newline, _ = file.read().rpartition(b"\n")
    return [json.loads(line) for line in complete.splitlines()], position + len(complete + newline)
