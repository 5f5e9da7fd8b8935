"""Which code a site runs: one digest over all of it, the same wherever it lies.

Flower's own hash is of the packed app, whose bytes depend on when it was packed; this one is of
what is executed. The check inside the app (``client.gate``) binds an honest coordinator: a
dishonest one could ship code without it. What keeps unapproved code from running at all has to
stand outside the app.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath

from configs.run import ConfigError

ROOMS = ("client", "configs", "mtl_model", "server", "simulation")
APPS = "apps.py"


@lru_cache(maxsize=1)
def own_release() -> str:
    """The digest of the code that is running."""
    return release_of_folder(Path(__file__).resolve().parent.parent)


def release_of_folder(root: Path) -> str:
    """The digest of a checkout or of an unpacked app."""
    names = [APPS, *(f"{room}/{path.name}" for room in ROOMS for path in (root / room).glob("*"))]
    return _digest(names, lambda name: (root / name).read_bytes())


def release_of_fab(path: Path) -> str:
    """The digest of a packed app (``flwr build``).

    Raises:
        ConfigError: if the file is not one.
    """
    try:
        with zipfile.ZipFile(path) as fab:
            return _digest(fab.namelist(), fab.read)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(f"{path}: expected a packed app (.fab) of Polyclinic, {error}") from None


def _digest(names: Iterable[str], read: Callable[[str], bytes]) -> str:
    """sha256 over the names and contents of Python files and presets, in order."""
    whole = hashlib.sha256()
    for name in sorted(set(names)):
        path = PurePosixPath(name)
        code = name == APPS or (
            len(path.parts) == 2 and path.parts[0] in ROOMS and path.suffix in (".py", ".toml")
        )
        if code:
            whole.update(f"{name}\0{hashlib.sha256(read(name)).hexdigest()}\n".encode())
    return whole.hexdigest()
