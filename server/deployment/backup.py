"""Back up and restore the coordinator's state: Flower's database and the folders of all runs."""

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
from polyclinic.server.deployment.preflight import DATABASE

RUNS = "runs"  # folder of the runs in the state folder


def back_up(state: Path, target: Path) -> int:
    """Write an archive of the state of a coordinator, which may be running.

    The database is copied with SQLite's backup API, so that the copy is consistent. The archive
    contains the last saved round of a run in progress.

    Returns:
        Size of the archive in bytes.

    Raises:
        ConfigError: if the folder has no state, or the archive already exists.
    """
    if not (state / DATABASE).is_file():
        raise ConfigError(f"{state}: expected a coordinator's state ({DATABASE}), found none")
    if target.exists():
        raise ConfigError(f"{target}: already exists and is not overwritten")
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
    """Add a file with its current content; skip one that a run has just deleted."""
    try:
        entry = archive.gettarinfo(path, name)
        content = path.read_bytes() if entry.isreg() else b""
    except FileNotFoundError:
        return
    entry.size = len(content)  # the file may have grown in between
    archive.addfile(entry, io.BytesIO(content))


def restore(archive: Path, state: Path) -> None:
    """Restore a backup into the state folder of a coordinator that is not running.

    Raises:
        ConfigError: if the folder already has a state, or the file is not a backup.
    """
    if (state / DATABASE).exists() or (state / RUNS).exists():
        raise ConfigError(f"{state}: already contains a coordinator's state; move it away first")
    try:
        with tarfile.open(archive, "r:gz") as packed:
            names = packed.getnames()
            if DATABASE not in names:
                raise ConfigError(f"{archive}: expected a backup with {DATABASE} in it")
            part = state / ".restoring"  # in the state folder, as a container can write only there
            shutil.rmtree(part, ignore_errors=True)
            packed.extractall(part, filter="data")
        for found in part.iterdir():
            found.replace(state / found.name)
        part.rmdir()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ConfigError(f"{archive}: cannot be restored: {error}") from None
