"""Read, identify and sign releases: packed apps (.fab) that the coordinator sends to sites.

A release is identified by a digest of the names and contents of its files. Unlike Flower's hash of
the packed bytes, the digest does not depend on when the app was packed, and it can be computed from
a checkout (``client.policy.releases``). Nothing is unpacked to disk or executed here.
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
MAX_BYTES = 100_000_000  # maximum size of an unpacked release; Flower packs at most 10 MB
PROJECT = "pyproject.toml"
LISTING = ".info/CONTENT"  # Flower's list of the hashes of the other files
SIGNED = b"polyclinic release\0"  # precedes the signed digest, so that it is valid only here


@dataclass(frozen=True)
class Release:
    """Contents of a packed app, read without unpacking it to disk or executing it."""

    digest: str  # sha256 of the names and contents of the files, hexadecimal
    version: str  # version in pyproject.toml
    files: Mapping[str, bytes]  # contents by name


def open_release(content: bytes) -> Release:
    """Read a packed app (.fab).

    Raises:
        ConfigError: if the content is not a packed app, or if its file names are not plain and
            distinct, so that unpacking it could write other files.
    """
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > MAX_BYTES:
                raise ConfigError(f"expected a packed app below {MAX_BYTES / 1e6:g} MB unpacked")
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
    """Compute the sha256 digest of the names and contents of a release's files.

    The digest of pyproject.toml is of its parsed settings, because Flower rewrites the file when it
    packs. Flower's list of the other files is ignored.

    Raises:
        tomllib.TOMLDecodeError: if pyproject.toml is not valid TOML.
    """
    whole = hashlib.sha256()
    for name in sorted(set(files) - {LISTING}):
        content = files[name]
        if name == PROJECT:
            settings = tomllib.loads(content.decode())
            content = json.dumps(settings, sort_keys=True, default=str).encode()
        whole.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return whole.hexdigest()


def _check_name(name: str, files: Mapping[str, bytes]) -> None:
    """Refuse a file name that could overwrite another file when it is unpacked."""
    path = PurePosixPath(name)
    plain = (
        path.as_posix() == name
        and not path.is_absolute()
        and ".." not in path.parts
        and not set(name) & set('\\:\0"<>|?*')
        and name.isprintable()
    )
    if not plain or name.casefold() in {other.casefold() for other in files}:
        raise ConfigError(f"expected plain and distinct file names in a packed app, got {name!r}")


def read_release(path: Path) -> tuple[bytes, Release]:
    """Read a packed app from a file.

    Returns:
        The file's bytes and the release in them.

    Raises:
        ConfigError: if the file cannot be read or is not a packed app.
    """
    try:
        content = path.read_bytes()
        return content, open_release(content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def sign(release: Release, key_file: Path) -> str:
    """Sign a release for sites that have a ``release-signer``.

    Returns:
        The signature, base64.

    Raises:
        ConfigError: if the file is not an Ed25519 private key without a password.
    """
    try:
        key = load_ssh_private_key(key_file.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key_file}: expected an Ed25519 private key, {error}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{key_file}: expected an Ed25519 key, got {type(key).__name__}")
    return base64.b64encode(key.sign(SIGNED + release.digest.encode())).decode()


def check_signature(release: Release, signature: str, signer: str) -> None:
    """Check that a release was signed with the key of the federation's release signer.

    Args:
        release: the release.
        signature: output of ``polyclinic server sign``, base64.
        signer: the signer's Ed25519 public key, one line as OpenSSH writes it.

    Raises:
        ConfigError: if the signature is invalid or the key is not an Ed25519 public key.
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
            f"release {release.digest[:12]}: expected a signature of this site's release-signer, "
            "got an invalid one"
        ) from None
