"""Read the certificates and keys of a federation, at the coordinator and at sites.

The coordinator's authority signs the server's certificate and one certificate per site. TLS
verifies the server's certificate. A site's certificate is not used in TLS, because Flower
authenticates a site by its key. It records until when the coordinator accepts the key, so that a
site can detect that its kit has expired.
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

WARN = timedelta(days=30)  # warn about certificates that expire within this time


@dataclass(frozen=True)
class Validity:
    """Period in which a certificate is valid."""

    start: datetime  # UTC
    end: datetime  # UTC

    def problem(self, now: datetime) -> str:
        """Return why the certificate is not valid now; empty if it is."""
        if now < self.start:
            return (
                f"is not valid before {self.start:%Y-%m-%d %H:%M} UTC; it is {now:%Y-%m-%d %H:%M}"
            )
        if now > self.end:
            return f"expired on {self.end:%Y-%m-%d %H:%M} UTC"
        return ""

    def left(self, now: datetime) -> timedelta:
        """Return the time until the end."""
        return self.end - now


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate in PEM format.

    Raises:
        ConfigError: if the file cannot be read or is not a certificate.
    """
    content = _read(path)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ConfigError(f"{path}: expected a certificate (PEM), {error}") from None


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the private key of a site or of the server, in PEM or OpenSSH format.

    Raises:
        ConfigError: if the file cannot be read, is not an elliptic-curve key without a password,
            or is readable by users other than its owner.
    """
    content = _read(path)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path}: expected a private key that only its owner can read; run chmod 600 {path}"
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
    """Return the name of the certificate's subject: a site, a server or an authority."""
    (attribute,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(attribute.value)


def validity_of(certificate: x509.Certificate) -> Validity:
    """Return the period in which a certificate is valid."""
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def public_line(key: ec.EllipticCurvePublicKey) -> str:
    """Format a public key as one line, as OpenSSH writes it and Flower reads it."""
    return key.public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    ).decode()


def key_of(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """Return the public key of a certificate.

    Raises:
        ConfigError: if it is not an elliptic-curve key.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"expected an elliptic-curve key, got {type(key).__name__}")
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Compute a short fingerprint of a key, which people can compare over the telephone."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashlib.sha256(der).hexdigest()
    return ":".join(digest[i : i + 4] for i in range(0, 32, 4))


def vouched_for(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def now_utc() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)
