"""Store arrays that a site keeps between the rounds of a run and never sends.

At present these are the personal layers (``strategy.personal``). Methods with other local state,
such as control variates, can use the same storage.

There is one file per round, ``round-0007.safetensors``, which survives restarts. If a round is
repeated after a restart of the server, it starts from the same earlier round as the first time, so
a resumed run gives the same result as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from polyclinic.configs.files import write_atomically
from polyclinic.mtl_model.packing import Layout, Packed

log = logging.getLogger(__name__)

ROUNDS_KEPT = 3  # latest rounds to keep besides the best one; the server repeats one at most


class SiteMemory:
    """The stored arrays of one site and one run.

    Args:
        folder: folder of the files; created on first use.
        layout: layout of the arrays.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    def keep(self, number: int, arrays: Packed, best: int) -> None:
        """Write the arrays of a round atomically and delete files that are no longer needed.

        Args:
            number: the round.
            arrays: its arrays.
            best: round of the server's best model, which is tested at the end; 0: none yet.

        Raises:
            OSError: if the file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(number)
        about = {"layout": self.layout.digest, "sha256": _digest(arrays)}
        write_atomically(path, save(arrays, about))
        rounds = self._rounds()
        recent = [n for n in rounds if n <= number][-ROUNDS_KEPT:]
        tested = [n for n in rounds if n <= best][-1:]
        for old in set(rounds) - {*recent, *tested}:
            with contextlib.suppress(OSError):  # a file that cannot be deleted does no harm
                self._path(old).unlink(missing_ok=True)

    def recall(self, number: int) -> Packed | None:
        """Read the arrays of the latest round up to ``number``; return None if there are none.

        A file that is damaged or belongs to another network is skipped with a warning in the log.
        """
        for kept in reversed([n for n in self._rounds() if n <= number]):
            try:
                return self._read(self._path(kept))
            except (OSError, SafetensorError, ValueError) as error:
                log.warning(
                    "%s: cannot be used, trying earlier rounds: %s", self._path(kept), error
                )
        return None

    def _read(self, path: Path) -> Packed:
        with safe_open(path, "numpy") as file:
            about: Mapping[str, str] = file.metadata() or {}
            arrays: Packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if about.get("layout") != self.layout.digest:
            raise ValueError("expected this network's personal layers, got those of another one")
        if about.get("sha256") != _digest(arrays):
            raise ValueError("expected the arrays that were written, got different ones")
        self.layout.check(arrays)
        return arrays

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.safetensors"

    def _rounds(self) -> list[int]:
        found = (
            re.fullmatch(r"round-(\d+)\.safetensors", path.name) for path in self.folder.glob("*")
        )
        return sorted(int(match[1]) for match in found if match)


def _digest(arrays: Packed) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(key.encode())
        digest.update(arrays[key].tobytes())
    return digest.hexdigest()
