"""Backup of the coordinator's state: Flower's database and every run's folder, while it runs."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from pathlib import Path

from polyclinic.configs.errors import ConfigError
from polyclinic.server.deployment.startup import DATABASE

RUNS = "runs"


def back_up(state: Path, target: Path) -> int:
    """Write one archive of a coordinator's state.

    The database is copied by SQLite's own backup, so that it is whole; of a run that goes on, the
    last saved round is.

    Returns:
        Its size in bytes.

    Raises:
        ConfigError: if there is no state, or the archive is there already.
    """
    if not (state / DATABASE).is_file():
        raise ConfigError(f"{state}: expected a coordinator's state ({DATABASE}), found none")
    if target.exists():
        raise ConfigError(f"{target}: is there already, and is not written over")
    part = target.with_name(f"{target.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with (
        tempfile.TemporaryDirectory() as scratch,
        os.fdopen(descriptor, "wb") as raw,
        tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as archive,
    ):
        copy = Path(scratch) / DATABASE
        with sqlite3.connect(state / DATABASE) as source, sqlite3.connect(copy) as sink:
            source.backup(sink)
        archive.add(copy, DATABASE)
        for path in sorted((state / RUNS).rglob("*")):
            _add(archive, path, str(path.relative_to(state)))
    part.replace(target)
    return target.stat().st_size


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file as it is now; one that a run has just replaced by the next is not missed."""
    try:
        entry = archive.gettarinfo(path, name)
        content = path.read_bytes() if entry.isreg() else b""
    except FileNotFoundError:
        return
    entry.size = len(content)  # it may have grown
    archive.addfile(entry, io.BytesIO(content))


def restore(archive: Path, state: Path) -> None:
    """Lay a backup down where a coordinator is to start.

    Raises:
        ConfigError: if there is a state already, or the file is no backup.
    """
    if (state / DATABASE).exists() or (state / RUNS).exists():
        raise ConfigError(f"{state}: holds a coordinator's state; move it away first")
    try:
        with tarfile.open(archive, "r:gz") as packed:
            names = packed.getnames()
            if DATABASE not in names:
                raise ConfigError(f"{archive}: expected a backup with {DATABASE} in it")
            part = state / ".restoring"  # inside: a container may write nowhere else
            shutil.rmtree(part, ignore_errors=True)
            packed.extractall(part, filter="data")
        for found in part.iterdir():
            found.replace(state / found.name)
        part.rmdir()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ConfigError(f"{archive}: cannot be restored: {error}") from None
