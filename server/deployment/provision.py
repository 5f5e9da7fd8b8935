"""Kits: what the server and each site need, made from ``federation.yaml``.

    authority/      the key that signs everything; stays with the coordinator
    server/         the server's kit; sites/ in it says who may connect
    sites/NAME/     one site's kit
    removed/        kits of sites that were taken out

Called again, it makes what is missing and leaves the rest as it is, so that adding, removing or
renewing one site touches no other. ``server/sites`` is what a running server goes by.
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
LOOPBACK = ("localhost", "127.0.0.1")  # the coordinator's own connection
NOBODY = 10001  # the images' own user, where kits are made by root: no container runs as root
SERVER = "server"  # in --renew, and where its kit lies


@dataclass(frozen=True)
class KitChange:
    """Something that was done to the kits."""

    what: str  # the authority, the server, or a site's name
    did: str


@dataclass(frozen=True)
class Expiry:
    """Until when something in the kits holds."""

    what: str
    end: str
    days: int
    fingerprint: str


def provision(
    federation: FederationConfig, out: Path, renew: Collection[str] = ()
) -> list[KitChange]:
    """Make kits, or bring those that are there up to date.

    Args:
        renew: sites to give a new key and certificate, or "server".

    Returns:
        What was changed; nothing if nothing had to be.

    Raises:
        ConfigError: if a name to renew is none, or the kits there are not of this federation.
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
    """Until when the authority, the server and every site hold, the soonest first.

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
    """Whether it is time to renew."""
    return expiry.days < WARN.days


def _authority(federation: FederationConfig, folder: Path, changes: list[KitChange]) -> Authority:
    key_file, certificate_file = folder / "ca.key", folder / "ca.crt"
    if certificate_file.exists():
        certificate = read_certificate(certificate_file)
        expected = f"{federation.name} authority"
        if name_of(certificate) != expected:
            raise ConfigError(
                f"{folder}: expected the kits of federation {federation.name}, these are of "
                f"{name_of(certificate).removesuffix(' authority')}; give another --out"
            )
        return Authority(read_private_key(key_file), certificate)
    authority = Authority.make(federation.name)
    _write(key_file, private_pem(authority.key), private=True)
    _write(certificate_file, pem(authority.certificate))
    changes.append(KitChange("authority", f"made; keep {key_file} safe, and in a backup"))
    return authority


def _server_kit(
    federation: FederationConfig,
    authority: Authority,
    folder: Path,
    renew: bool,
    changes: list[KitChange],
) -> None:
    names = tuple(dict.fromkeys((*federation.server.names, *LOOPBACK)))
    key_file, certificate_file = folder / "server.key", folder / "server.crt"
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    why = "renewed" if renew else ""
    if not certificate_file.exists():
        why = "made"
    elif set(names_in(read_certificate(certificate_file))) != set(names):
        why = f"made anew for {', '.join(names)}"
    if why:
        key = new_key()
        certificate = authority.issue_server(names, key.public_key(), federation.days)
        _write(key_file, private_pem(key), private=True)
        _give(key_file)
        _write(certificate_file, pem(certificate))
        changes.append(KitChange(SERVER, f"{why}; copy its kit and restart it"))
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
            _give(key_file)
        before = authority.issue_site(member.name, public, federation.days)
        _write(certificate_file, pem(before))
        changes.append(KitChange(member.name, f"{why}; send it its kit"))
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
    """Why a site needs a new certificate; empty if it does not."""
    if before is None:
        return "added"
    if renew:
        return "renewed"
    if not vouched_for(before, authority.certificate):
        return "made anew, as the authority is another one"
    if member.public_key and public_line(key_of(before)) != member.public_key:
        return "made anew for its own key"
    return ""


def _own_key(member: Member) -> ec.EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(member.public_key.encode())
    except ValueError as error:
        raise ConfigError(f"site {member.name}: public-key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"site {member.name}: public-key: expected an elliptic-curve key")
    return key


def _remove(folder: Path, out: Path, changes: list[KitChange]) -> None:
    """Set a kit aside; a running server turns the site away within seconds."""
    stamp = now_utc().strftime("%Y%m%d-%H%M%S")
    aside = out / "removed" / f"{folder.name}-{stamp}"
    aside.parent.mkdir(exist_ok=True)
    folder.replace(aside)
    changes.append(KitChange(folder.name, f"removed; its kit lies in {aside}"))


def _names(federation: FederationConfig) -> dict[str, str]:
    """What templates may name."""
    return {
        "federation": federation.name,
        "version": VERSION,
        "address": federation.server.address,
        "port": str(federation.server.port),
        "uid": str(os.getuid() or NOBODY),
        "gid": str(os.getgid() or NOBODY),
    }


class _Template(string.Template):
    delimiter = "@"  # compose files are full of dollars


def _fill(template: str, target: Path, names: dict[str, str], keep: bool) -> None:
    """Write a text of a kit.

    Args:
        keep: leave one that is there, as its owner fills it in.
    """
    if keep and target.exists():
        return
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    _write(target, _Template(text).safe_substitute(names).encode())


def _give(key_file: Path) -> None:
    """Let the container's user own a kit's key, where root makes the kit."""
    if os.getuid() == 0:
        os.chown(key_file, NOBODY, NOBODY)


def _write(path: Path, content: bytes, private: bool = False) -> None:
    """Write a file at once, unless it is there and the same; a private one for its owner alone."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    part = path.with_name(f".{path.name}.part")
    mode = 0o600 if private else 0o644
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(content)
    part.chmod(mode)
    part.replace(path)
