"""Which sites may connect: the certificates in the coordinator's kit, read anew when they change.

Provisioning writes the files; whoever is not among them is turned away at the front door at once,
also in the middle of a run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.credentials import (
    Validity,
    fingerprint,
    key_of,
    name_of,
    now_utc,
    public_line,
    read_certificate,
    validity_of,
    vouched_for,
)
from configs.run import ConfigError

log = logging.getLogger("flwr.polyclinic")

LOOK_S = 2.0  # between two looks at the folder


@dataclass(frozen=True)
class Registered:
    """A site whose key the coordinator takes."""

    name: str
    public_key: str  # one line, as OpenSSH writes it
    fingerprint: str
    validity: Validity

    def problem(self) -> str:
        """Why its key is not taken now; empty if it is."""
        return self.validity.problem(now_utc())


class Registry:
    """The sites of a kit, by public key.

    Args:
        folder: of certificates, one a site.
        authority: the certificate that they must be signed by.
    """

    def __init__(self, folder: Path, authority: Path) -> None:
        self.folder = folder
        self.authority = read_certificate(authority)
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._stamp: object = None
        self._sites: dict[str, Registered] = {}

    def sites(self) -> Mapping[str, Registered]:
        """Every registered site, expired ones too, by its public key."""
        with self._lock:
            if time.monotonic() - self._looked > LOOK_S:
                self._looked = time.monotonic()
                files = sorted(self.folder.glob("*.crt"))
                stamp = [(path.name, path.stat().st_mtime_ns) for path in files]
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._sites = dict(self._read(files))
            return self._sites

    def _read(self, files: list[Path]) -> list[tuple[str, Registered]]:
        found = []
        for path in files:
            try:
                certificate = read_certificate(path)
                key = key_of(certificate)
            except ConfigError as error:  # half written, or damaged: that site alone stays out
                log.error("%s", error)
                continue
            if not vouched_for(certificate, self.authority):
                log.error("%s: is not signed by this federation's authority; left out", path)
                continue
            line = public_line(key)
            site = Registered(
                name_of(certificate), line, fingerprint(key), validity_of(certificate)
            )
            found.append((line, site))
        return found
