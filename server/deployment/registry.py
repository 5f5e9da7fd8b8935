"""Which sites may connect: the certificates in the coordinator's kit, read anew when they change.

Provisioning writes the files; who is not named in the kit's federation.yaml, or has no certificate
there, is turned away at the front door at once, also in the middle of a run. A certificate that was
left behind when a kit was copied over an older one is of nobody.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.federation import FEDERATION, read_federation
from polyclinic.configs.security.credentials import (
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

log = logging.getLogger("flwr.polyclinic")

AUTHORITY = "ca.crt"
SITES = "sites"  # certificates, one a site, by its name
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
    """The sites of a server's kit, by public key.

    Raises:
        ConfigError: if the kit's certificate of the authority cannot be read.
    """

    def __init__(self, kit: Path) -> None:
        self.kit = kit
        self.authority = read_certificate(kit / AUTHORITY)
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._stamp: object = None
        self._sites: dict[str, Registered] = {}

    def sites(self) -> Mapping[str, Registered]:
        """Every registered site, expired ones too, by its public key."""
        with self._lock:
            if time.monotonic() - self._looked > LOOK_S:
                self._looked = time.monotonic()
                files = [self.kit / FEDERATION, *sorted((self.kit / SITES).glob("*.crt"))]
                stamp = [(path, _changed(path)) for path in files]
                if stamp != self._stamp:
                    self._stamp = stamp
                    self._sites = self._read(files[1:])
            return self._sites

    def _read(self, files: list[Path]) -> dict[str, Registered]:
        found: dict[str, Registered] = {}
        try:
            named = {site.name for site in read_federation(self.kit / FEDERATION).sites}
        except ConfigError as error:
            log.error("%s; no site is let in", error)
            return found
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
            name, line = name_of(certificate), public_line(key)
            if name not in named or path.stem != name:
                log.error("%s: site %s is not in federation.yaml so; left out", path, name)
                continue
            found[line] = Registered(name, line, fingerprint(key), validity_of(certificate))
        return found


def _changed(path: Path) -> int:
    """When a file was last written; 0 if it has just been taken away."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
