"""Certificates and keys of a federation, as both ends read them.

A coordinator's authority signs the server's certificate and one for each site's key. TLS checks
the server's. A site's is not used in TLS: Flower knows a site by its key. It says until when the
coordinator takes that key, so that an expired kit can say so itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from polyclinic.configs.errors import ConfigError

WARN = timedelta(days=30)


@dataclass(frozen=True)
class Validity:
    """From when to when something holds."""

    start: datetime
    end: datetime

    def problem(self, now: datetime) -> str:
        """Why it does not hold; empty if it does."""
        if now < self.start:
            return (
                f"is not valid before {self.start:%Y-%m-%d %H:%M} UTC; it is {now:%Y-%m-%d %H:%M}"
            )
        if now > self.end:
            return f"expired on {self.end:%Y-%m-%d %H:%M} UTC"
        return ""

    def left(self, now: datetime) -> timedelta:
        return self.end - now


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate of PEM.

    Raises:
        ConfigError: if it cannot be read or is none.
    """
    content = _read(path)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ConfigError(f"{path}: expected a certificate (PEM), {error}") from None


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a site's or the server's private key.

    Raises:
        ConfigError: if it cannot be read, is none, or others than its owner may read it.
    """
    content = _read(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path}: others than its owner may read this private key; chmod 600 {path}"
        )
    load = (
        serialization.load_ssh_private_key
        if b"OPENSSH" in content[:64]
        else serialization.load_pem_private_key
    )
    try:
        key = load(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: expected a private key without a password, {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: expected an elliptic-curve key, got {type(key).__name__}")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def name_of(certificate: x509.Certificate) -> str:
    """Whom a certificate is for."""
    (attribute,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(attribute.value)


def validity_of(certificate: x509.Certificate) -> Validity:
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def public_line(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as one line, as OpenSSH writes it and Flower reads it."""
    return key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()


def key_of(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """The key that a certificate is about.

    Raises:
        ConfigError: if it is of another kind than ours.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"expected an elliptic-curve key, got {type(key).__name__}")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """A short name of a key, to compare over the telephone."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashlib.sha256(der).hexdigest()
    return ":".join(digest[i : i + 4] for i in range(0, 32, 4))


def vouched_for(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def now_utc() -> datetime:
    return datetime.now(UTC)
