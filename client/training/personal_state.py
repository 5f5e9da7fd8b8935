"""What a site keeps of a run from round to round, and across restarts: arrays that are never sent.

Today these are personal layers (``strategy.personal``). A method that needs more of a site, such as
control variates, keeps it here too.

One file a round, ``round-0007.safetensors``. A round that is done again after the server was
restarted begins where it began the first time, with what was kept of an earlier round, so that a
resumed run is the run that was interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from polyclinic.mtl_model.packing import Layout, Packed

log = logging.getLogger(__name__)

ROUNDS_KEPT = 3  # the server goes back one round at most; its best round's is kept besides


class SiteMemory:
    """One site's memory of one run.

    Args:
        folder: that holds it; made when something is kept.
        layout: of the arrays.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    def keep(self, number: int, arrays: Packed, best: int) -> None:
        """Write what a round left, whole or not at all, and drop what is no longer needed.

        Args:
            best: the round whose model the server holds for the best, which is tested at the end.

        Raises:
            OSError: if it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(number)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(save(arrays, {"layout": self.layout.digest, "sha256": _digest(arrays)}))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        rounds = self._rounds()
        recent = [n for n in rounds if n <= number][-ROUNDS_KEPT:]
        tested = [n for n in rounds if n <= best][-1:]
        for old in set(rounds) - {*recent, *tested}:
            with contextlib.suppress(OSError):  # it is in nobody's way
                self._path(old).unlink(missing_ok=True)

    def recall(self, number: int) -> Packed | None:
        """What was kept of the latest round up to ``number``; None if there is nothing of use.

        A file that is damaged, or of another network, is told in the site's log and passed over.
        """
        for kept in reversed([n for n in self._rounds() if n <= number]):
            try:
                return self._read(self._path(kept))
            except (OSError, SafetensorError, ValueError) as error:
                log.warning("%s cannot be used, an earlier one is: %s", self._path(kept), error)
        return None

    def _read(self, path: Path) -> Packed:
        with safe_open(path, "numpy") as file:
            about: Mapping[str, str] = file.metadata() or {}
            arrays: Packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if about.get("layout") != self.layout.digest:
            raise ValueError("expected this network's personal layers, got another's")
        if about.get("sha256") != _digest(arrays):
            raise ValueError("expected the arrays that were written, got others")
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
