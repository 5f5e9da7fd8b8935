"""A release as it is shipped: a packed app (.fab), known by one digest, perhaps signed.

The digest is over the names and contents of all its files, the same whenever it was packed and, for
a checkout, before it is (``client.policy.releases``); Flower's own hash is of the packed bytes.
Nothing is run or unpacked here.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import lzma
import struct
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from polyclinic.configs.errors import ConfigError

UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError),
    *(KeyError, ValueError, TypeError, OSError),
)
MOST_BYTES = 100_000_000  # of an unpacked release; Flower packs 10 MB at most
PROJECT = "pyproject.toml"
LISTING = ".info/CONTENT"  # Flower's, of the other files' own hashes
SIGNED = b"polyclinic release\0"  # before the digest, so that no other signature serves


@dataclass(frozen=True)
class Release:
    """A packed app, opened without running or unpacking anything."""

    digest: str
    version: str
    files: Mapping[str, bytes]


def open_release(content: bytes) -> Release:
    """Read a packed app (.fab).

    Raises:
        ConfigError: if it is none, or could be unpacked to other files than its names say.
    """
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > MOST_BYTES:
                raise ConfigError(f"expected a packed app below {MOST_BYTES / 1e6:g} MB unpacked")
            for entry in packed.infolist():
                _check_name(entry.filename, files)
                files[entry.filename] = packed.read(entry)
        version = str(tomllib.loads(files[PROJECT].decode())["project"]["version"])
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"expected a packed app (.fab) with a pyproject.toml, {error}") from None
    return Release(digest_of(files), version, files)


def digest_of(files: Mapping[str, bytes]) -> str:
    """sha256 over the names and contents of a release's files, in order.

    Of pyproject.toml, over what it says: Flower writes it anew when it packs. Its listing of the
    other files does not count.

    Raises:
        tomllib.TOMLDecodeError: if pyproject.toml is none.
    """
    whole = hashlib.sha256()
    for name in sorted(set(files) - {LISTING}):
        content = files[name]
        if name == PROJECT:
            said = tomllib.loads(content.decode())
            content = json.dumps(said, sort_keys=True, default=str).encode()
        whole.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()


def _check_name(name: str, files: Mapping[str, bytes]) -> None:
    """Refuse names that may fall on another file when they are unpacked."""
    path = PurePosixPath(name)
    plain = (
        path.as_posix() == name
        and not path.is_absolute()
        and ".." not in path.parts
        and not set(name) & set('\\:\0"<>|?*')
        and name.isprintable()
    )
    if not plain or name.casefold() in {other.casefold() for other in files}:
        raise ConfigError(f"expected plain and different file names in a packed app, got {name!r}")


def read_release(path: Path) -> tuple[bytes, Release]:
    """A packed app's bytes, and what is in them.

    Raises:
        ConfigError: if the file cannot be read or is none.
    """
    try:
        content = path.read_bytes()
        return content, open_release(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def sign(release: Release, key_file: Path) -> str:
    """Sign a release, for sites that have a release-signer.

    Returns:
        The signature, base64.

    Raises:
        ConfigError: if the file is no Ed25519 private key without a password.
    """
    try:
        key = load_ssh_private_key(key_file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key_file}: expected an Ed25519 private key, {error}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{key_file}: expected an Ed25519 key, got {type(key).__name__}")
    return base64.b64encode(key.sign(SIGNED + release.digest.encode())).decode()


def check_signature(release: Release, signature: str, signer: str) -> None:
    """See that a release was signed by whoever signs releases of the consortium.

    Args:
        signature: of ``polyclinic server sign``, base64.
        signer: an Ed25519 public key as OpenSSH writes it, one line.

    Raises:
        ConfigError: if it was not.
    """
    try:
        key = load_ssh_public_key(signer.encode())
    except ValueError as error:
        raise ConfigError(f"release-signer: expected an Ed25519 public key, {error}") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError(f"release-signer: expected an Ed25519 key, got {type(key).__name__}")
    try:
        key.verify(
            base64.b64decode(signature.strip(), validate=True), SIGNED + release.digest.encode()
        )
    except (InvalidSignature, ValueError):
        raise ConfigError(
            f"release {release.digest[:12]}: its signature is not of this site's release-signer"
        ) from None
