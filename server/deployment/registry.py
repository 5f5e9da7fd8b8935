"""The sites that may connect, according to the certificates in the coordinator's kit.

Provisioning writes the certificates, and a running coordinator reads them again when they change. A
site that is not in the kit's federation.yaml, or has no certificate in the kit, is refused at once,
also during a run. Certificates of sites that are not in federation.yaml are ignored, such as those
left over when a kit was copied over an older one.
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

AUTHORITY = "ca.crt"  # certificate of the authority
SITES = "sites"  # folder with one certificate per site, NAME.crt
LOOK_S = 2.0  # seconds between two checks of the folder for changes


@dataclass(frozen=True)
class Registered:
    """A site with a registered key."""

    name: str  # name of the site
    public_key: str  # one line, as OpenSSH writes it
    fingerprint: str  # of the public key, to compare
    validity: Validity  # period in which the key is accepted

    def problem(self) -> str:
        """Return why the key is not accepted now; empty if it is."""
        return self.validity.problem(now_utc())


class Registry:
    """Sites in the kit of a server, by public key.

    Args:
        kit: folder of the server's kit.

    Raises:
        ConfigError: if the certificate of the authority in the kit cannot be read.
    """

    def __init__(self, kit: Path) -> None:
        self.kit = kit
        self.authority = read_certificate(kit / AUTHORITY)
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._stamp: object = None
        self._sites: dict[str, Registered] = {}

    def sites(self) -> Mapping[str, Registered]:
        """Return all registered sites by public key, including those with expired keys."""
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
            log.error("%s; all sites are refused", error)
            return found
        for path in files:
            try:
                certificate = read_certificate(path)
                key = key_of(certificate)
            except ConfigError as error:  # incomplete or damaged; only this site is refused
                log.error("%s", error)
                continue
            if not vouched_for(certificate, self.authority):
                log.error("%s: ignored, it is not signed by this federation's authority", path)
                continue
            name, line = name_of(certificate), public_line(key)
            if name not in named or path.stem != name:
                log.error(
                    "%s: ignored, expected NAME.crt of a site in federation.yaml, got site %s",
                    path,
                    name,
                )
                continue
            found[line] = Registered(name, line, fingerprint(key), validity_of(certificate))
        return found


def _changed(path: Path) -> int:
    """Return when a file was last written, in nanoseconds; 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
