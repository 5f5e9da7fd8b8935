"""Make kits for the server and each site from ``federation.yaml``.

    authority/      the key that signs all certificates; stays with the coordinator
    server/         the server's kit; its folder sites/ has the certificates of registered sites
    sites/NAME/     one kit per site
    removed/        kits of removed sites

Provisioning again makes only what is missing and keeps the rest, so that adding, removing or
renewing one site does not affect the others. A running server registers the sites in
``server/sites``.
"""

from __future__ import annotations

import os
import string
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509 import Certificate

from polyclinic.configs import VERSION
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.files import write_atomically
from polyclinic.configs.schema.federation import FEDERATION, FederationConfig, Member
from polyclinic.configs.security.credentials import (
    WARN,
    fingerprint,
    key_of,
    name_of,
    now_utc,
    public_line,
    read_certificate,
    read_private_key,
    validity_of,
    vouched_for,
)
from polyclinic.server.deployment.authority import (
    Authority,
    names_in,
    new_key,
    pem,
    private_openssh,
    private_pem,
)

TEMPLATES = Path(__file__).resolve().parents[2] / "docker"
LOOPBACK = ("localhost", "127.0.0.1")  # names for the coordinator's own connection
NOBODY = 10001  # user of the containers in kits that root makes; no container runs as root
SERVER = "server"  # the server's name in --renew and the folder of its kit


@dataclass(frozen=True)
class KitChange:
    """A change of the kits."""

    what: str  # authority, server, or the name of a site
    did: str  # what was changed, and what to do next


@dataclass(frozen=True)
class Expiry:
    """Expiry of one certificate in the kits."""

    what: str  # authority, server, or the name of a site
    end: str  # UTC, ISO 8601
    days: int  # days left; negative if it has expired
    fingerprint: str  # of the public key, to compare


def provision(
    federation: FederationConfig, out: Path, renew: Collection[str] = ()
) -> list[KitChange]:
    """Make kits, or update existing ones.

    Args:
        federation: the server and the sites.
        out: folder of the kits.
        renew: names of sites, or "server", that get a new key and certificate.

    Returns:
        The changes; empty if the kits were up to date.

    Raises:
        ConfigError: if a name in ``renew`` is unknown, or the kits are of another federation.
    """
    unknown = set(renew) - {SERVER, *(site.name for site in federation.sites)}
    if unknown:
        raise ConfigError(f"--renew: expected sites of the federation, got {', '.join(unknown)}")
    if not (TEMPLATES / "compose.site.yml").is_file():
        raise ConfigError(f"{TEMPLATES}: expected the project's docker folder; use a checkout")
    changes: list[KitChange] = []
    authority = _authority(federation, out / "authority", changes)
    _server_kit(federation, authority, out / SERVER, SERVER in renew, changes)
    for member in federation.sites:
        _site_kit(federation, member, authority, out, member.name in renew, changes)
    for folder in sorted((out / "sites").iterdir()):
        if folder.name not in {member.name for member in federation.sites}:
            _remove(folder, out, changes)
    registered = {f"{member.name}.crt" for member in federation.sites}
    for path in (out / SERVER / "sites").glob("*.crt"):
        if path.name not in registered:
            path.unlink()
    return changes


def expiries(kits: Path) -> list[Expiry]:
    """List when the certificates in the kits expire, the soonest first.

    Raises:
        ConfigError: if there are no kits.
    """
    files = {"authority": kits / "authority" / "ca.crt", SERVER: kits / SERVER / "server.crt"}
    files |= {path.stem: path for path in (kits / SERVER / "sites").glob("*.crt")}
    found = []
    for what, path in files.items():
        certificate = read_certificate(path)
        validity = validity_of(certificate)
        days = validity.left(now_utc()).days
        end = validity.end.isoformat(timespec="minutes")
        found.append(Expiry(what, end, days, fingerprint(key_of(certificate))))
    return sorted(found, key=lambda each: each.days)


def soon(expiry: Expiry) -> bool:
    """Return whether it is time to renew the certificate."""
    return expiry.days < WARN.days


def _authority(federation: FederationConfig, folder: Path, changes: list[KitChange]) -> Authority:
    """Read the federation's authority, or create it on the first call."""
    key_file, certificate_file = folder / "ca.key", folder / "ca.crt"
    if certificate_file.exists():
        certificate = read_certificate(certificate_file)
        expected = f"{federation.name} authority"
        if name_of(certificate) != expected:
            raise ConfigError(
                f"{folder}: expected the kits of federation {federation.name}, got those of "
                f"{name_of(certificate).removesuffix(' authority')}; use another --out"
            )
        return Authority(read_private_key(key_file), certificate)
    authority = Authority.make(federation.name)
    _write(key_file, private_pem(authority.key), private=True)
    _write(certificate_file, pem(authority.certificate))
    changes.append(KitChange("authority", f"created; keep {key_file} secret, and back it up"))
    return authority


def _server_kit(
    federation: FederationConfig,
    authority: Authority,
    folder: Path,
    renew: bool,
    changes: list[KitChange],
) -> None:
    """Write the server's kit, with a new certificate if one is needed."""
    names = tuple(dict.fromkeys((*federation.server.names, *LOOPBACK)))
    key_file, certificate_file = folder / "server.key", folder / "server.crt"
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    why = "renewed" if renew else ""
    if not certificate_file.exists():
        why = "created"
    elif set(names_in(read_certificate(certificate_file))) != set(names):
        why = f"renewed for {', '.join(names)}"
    if why:
        key = new_key()
        certificate = authority.issue_server(names, key.public_key(), federation.days)
        _write(key_file, private_pem(key), private=True)
        _set_owner(key_file)
        _write(certificate_file, pem(certificate))
        changes.append(KitChange(SERVER, f"{why}; copy the kit to the server and restart it"))
    _write(folder / "ca.crt", pem(authority.certificate))
    content = federation.model_dump(mode="json", by_alias=True)
    _write(folder / FEDERATION, yaml.safe_dump(content, sort_keys=False).encode())
    names_of = _names(federation)
    for template, name in (
        ("compose.coordinator.yml", "compose.yml"),
        ("kit/README.coordinator.md", "README.md"),
        ("kit/coordinator.env", ".env"),
        ("kit/polyclinic-coordinator.service", "polyclinic-coordinator.service"),
    ):
        _fill(template, folder / name, names_of, keep=name == ".env")


def _site_kit(
    federation: FederationConfig,
    member: Member,
    authority: Authority,
    out: Path,
    renew: bool,
    changes: list[KitChange],
) -> None:
    """Write a site's kit, with a new certificate if one is needed."""
    folder = out / "sites" / member.name
    certificate_file, key_file = folder / "site.crt", folder / "site.key"
    registered = out / SERVER / "sites" / f"{member.name}.crt"
    before = read_certificate(certificate_file) if certificate_file.exists() else None
    why = _why_new(member, before, renew, authority)
    if why:
        if member.public_key:
            public = _own_key(member)
            key_file.unlink(missing_ok=True)
        else:
            key = new_key()
            public = key.public_key()
            _write(key_file, private_openssh(key), private=True)
            _set_owner(key_file)
        before = authority.issue_site(member.name, public, federation.days)
        _write(certificate_file, pem(before))
        changes.append(KitChange(member.name, f"{why}; send the kit to the site"))
    assert before is not None
    _write(registered, pem(before))
    _write(folder / "ca.crt", pem(authority.certificate))
    names = _names(federation) | {
        "site": member.name,
        "signer": f'release-signer: "{federation.release_signer}"\n'
        if federation.release_signer
        else "",
    }
    for template, name in (
        ("compose.site.yml", "compose.yml"),
        ("compose.gpu.yml", "compose.gpu.yml"),
        ("kit/README.site.md", "README.md"),
        ("kit/site.env", ".env"),
        ("kit/site.yaml", "site.yaml"),
        ("kit/polyclinic-site.service", "polyclinic-site.service"),
    ):
        _fill(template, folder / name, names, keep=name in (".env", "site.yaml"))


def _why_new(member: Member, before: Certificate | None, renew: bool, authority: Authority) -> str:
    """Return why a site needs a new certificate; empty if it does not."""
    if before is None:
        return "added"
    if renew:
        return "renewed"
    if not vouched_for(before, authority.certificate):
        return "renewed, because the authority has changed"
    if member.public_key and public_line(key_of(before)) != member.public_key:
        return "renewed for the site's own key"
    return ""


def _own_key(member: Member) -> ec.EllipticCurvePublicKey:
    """Parse the public key of a site that made its own private key."""
    try:
        key = load_ssh_public_key(member.public_key.encode())
    except ValueError as error:
        raise ConfigError(f"site {member.name}: public-key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            f"site {member.name}: public-key: expected an elliptic-curve key, got "
            f"{type(key).__name__}"
        )
    return key


def _remove(folder: Path, out: Path, changes: list[KitChange]) -> None:
    """Move the kit of a removed site away. A running server refuses the site within seconds."""
    stamp = now_utc().strftime("%Y%m%d-%H%M%S")
    aside = out / "removed" / f"{folder.name}-{stamp}"
    aside.parent.mkdir(exist_ok=True)
    folder.replace(aside)
    changes.append(KitChange(folder.name, f"removed; its kit is now in {aside}"))


def _names(federation: FederationConfig) -> dict[str, str]:
    """Return the values for the placeholders in templates."""
    return {
        "federation": federation.name,
        "version": VERSION,
        "address": federation.server.address,
        "port": str(federation.server.port),
        "uid": str(os.getuid() or NOBODY),
        "gid": str(os.getgid() or NOBODY),
    }


class _Template(string.Template):
    delimiter = "@"  # compose files use the dollar sign


def _fill(template: str, target: Path, names: dict[str, str], keep: bool) -> None:
    """Fill in a template and write it into a kit.

    Args:
        template: name of the template.
        target: file to write.
        names: values of the placeholders.
        keep: do not replace an existing file, because its owner edits it.
    """
    if keep and target.exists():
        return
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    _write(target, _Template(text).safe_substitute(names).encode())


def _set_owner(key_file: Path) -> None:
    """Make the container's user the owner of a kit's key, if root makes the kit."""
    if os.getuid() == 0:
        os.chown(key_file, NOBODY, NOBODY)


def _write(path: Path, content: bytes, private: bool = False) -> None:
    """Write a file atomically if its content has changed.

    Args:
        path: the file.
        content: its content.
        private: let only the owner read and write it.
    """
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    write_atomically(path, content, mode=0o600 if private else 0o644)
