"""The federation's own certificate authority, which signs the certificates of server and sites."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from polyclinic.configs.schema.federation import is_ip
from polyclinic.configs.security.credentials import now_utc

AUTHORITY_DAYS = 3650  # validity of the authority's certificate, in days
BACKDATED = timedelta(hours=1)  # start of validity before now, because sites' clocks may be slow


@dataclass(frozen=True)
class Authority:
    """The authority's private key and its certificate."""

    key: ec.EllipticCurvePrivateKey  # signs certificates
    certificate: x509.Certificate  # verifies them; in every kit

    @classmethod
    def make(cls, federation: str) -> Authority:
        """Create an authority with a new key.

        Args:
            federation: name of the federation.
        """
        key = new_key()
        name = _name(f"{federation} authority", federation)
        usage = _usage(certificates=True)
        builder = (
            _builder(name, key.public_key(), AUTHORITY_DAYS)
            .issuer_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
        )
        return cls(key, builder.sign(key, hashes.SHA384()))

    def issue_server(
        self, names: Sequence[str], key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.Certificate:
        """Issue a certificate for the server.

        Args:
            names: host names and IP addresses at which sites reach the server.
            key: the server's public key.
            days: validity in days.
        """
        alternatives = [_alternative(name) for name in names]
        builder = (
            self._leaf(names[0], key, days)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        )
        return builder.sign(self.key, hashes.SHA384())

    def issue_site(self, site: str, key: ec.EllipticCurvePublicKey, days: int) -> x509.Certificate:
        """Issue a certificate for a site, which records its name, key and expiry.

        Args:
            site: name of the site.
            key: the site's public key.
            days: validity in days.
        """
        builder = self._leaf(site, key, days).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        return builder.sign(self.key, hashes.SHA384())

    def _leaf(
        self, name: str, key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.CertificateBuilder:
        issuer = self.certificate.subject
        return (
            _builder(_name(name, _organisation(issuer)), key, days)
            .issuer_name(issuer)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )


def new_key() -> ec.EllipticCurvePrivateKey:
    """Generate a private key on the curve SECP384R1, which Flower requires for nodes."""
    return ec.generate_private_key(ec.SECP384R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Serialise a private key to PEM (PKCS #8), as TLS libraries read it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def private_openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Serialise a private key in OpenSSH format, as Flower reads the key of a node."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def pem(certificate: x509.Certificate) -> bytes:
    """Serialise a certificate to PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def names_in(certificate: x509.Certificate) -> tuple[str, ...]:
    """List the host names and IP addresses in a server's certificate."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return tuple(str(each.value) for each in found)


def _builder(name: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = now_utc()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str, organisation: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _organisation(name: x509.Name) -> str:
    (attribute,) = name.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(attribute.value)


def _alternative(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if is_ip(name) else x509.DNSName(name)


def _usage(certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )
