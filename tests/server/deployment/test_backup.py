"""Backup and restore of a coordinator's state."""

from __future__ import annotations

import sqlite3
import tarfile
from pathlib import Path

import pytest

from polyclinic.configs.errors import ConfigError
from polyclinic.server.deployment.backup import back_up, restore


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    (folder / "runs" / "one" / "checkpoints").mkdir(parents=True)
    (folder / "runs" / "one" / "checkpoints" / "round-0001.safetensors").write_bytes(b"weights")
    (folder / "logs").mkdir()
    with sqlite3.connect(folder / "state.db") as database:
        database.execute("CREATE TABLE runs (name TEXT)")
        database.execute("INSERT INTO runs VALUES ('one')")
    return folder


def test_backup_restores_the_saved_state(state: Path, tmp_path: Path) -> None:
    size = back_up(state, tmp_path / "backup.tar.gz")
    assert size == (tmp_path / "backup.tar.gz").stat().st_size
    restore(tmp_path / "backup.tar.gz", tmp_path / "new")
    saved = tmp_path / "new" / "runs" / "one" / "checkpoints" / "round-0001.safetensors"
    assert saved.read_bytes() == b"weights"
    with sqlite3.connect(tmp_path / "new" / "state.db") as database:
        assert database.execute("SELECT name FROM runs").fetchall() == [("one",)]
    assert not (tmp_path / "new" / "logs").exists()


def test_backup_during_a_run_is_consistent(state: Path, tmp_path: Path, monkeypatch) -> None:
    """A file that disappears during the backup is skipped; a growing one is saved as it is."""
    vanishing = state / "runs" / "one" / "vanishing"
    vanishing.touch()
    growing = state / "runs" / "one" / "history.jsonl"
    growing.write_text("1\n")
    look = tarfile.TarFile.gettarinfo

    def busy(archive, path, name):
        entry = look(archive, path, name)
        if path == vanishing:
            vanishing.unlink()
        if path == growing:
            growing.write_text("1\n2\n")
        return entry

    monkeypatch.setattr(tarfile.TarFile, "gettarinfo", busy)
    with sqlite3.connect(state / "state.db") as database:
        database.execute("INSERT INTO runs VALUES ('open')")  # uncommitted
        back_up(state, tmp_path / "backup.tar.gz")
    restore(tmp_path / "backup.tar.gz", tmp_path / "new")
    assert (tmp_path / "new" / "runs" / "one" / "history.jsonl").read_text() == "1\n2\n"
    assert not (tmp_path / "new" / "runs" / "one" / "vanishing").exists()
    with sqlite3.connect(tmp_path / "new" / "state.db") as database:
        assert database.execute("SELECT name FROM runs").fetchall() == [("one",)]


def test_backup_and_restore_do_not_overwrite(state: Path, tmp_path: Path) -> None:
    archive = tmp_path / "backup.tar.gz"
    back_up(state, archive)
    with pytest.raises(ConfigError, match="already exists and is not overwritten"):
        back_up(state, archive)
    with pytest.raises(ConfigError, match="already contains a coordinator's state; move it"):
        restore(archive, state)
    with pytest.raises(ConfigError, match="expected a coordinator's state"):
        back_up(tmp_path / "empty", tmp_path / "other.tar.gz")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) - 40])
    with pytest.raises(ConfigError, match="cannot be restored"):
        restore(archive, tmp_path / "new")
    assert not (tmp_path / "new" / "state.db").exists()  # no partial state is left
    archive.write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="cannot be restored"):
        restore(archive, tmp_path / "new")
