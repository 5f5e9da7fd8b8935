"""The file ``federation.yaml``: a federation's server and sites, from which kits are made."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from polyclinic.configs.ports import PUBLIC
from polyclinic.configs.schema.base import Section
from polyclinic.configs.schema.site import NAME, read_yaml

FEDERATION = "federation.yaml"
RESERVED = (
    "authority",
    "pooled",
    "server",
)  # names with another meaning where site names are listed
HOST = r"^[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?$"


class ServerAddress(Section):
    """Address of the coordinator."""

    address: str = Field(
        pattern=HOST, description="Host name or IP address at which sites reach the coordinator."
    )
    port: int = Field(
        PUBLIC, ge=1, le=65535, description="TCP port at which sites reach the coordinator."
    )
    also: tuple[str, ...] = Field(
        (),
        description="Further host names and IP addresses of the coordinator, which its certificate "
        "also covers; empty: none.",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Host names and IP addresses that the server's certificate covers."""
        return tuple(dict.fromkeys((self.address, *self.also)))


class Member(Section):
    """One site of a federation."""

    name: str = Field(
        pattern=NAME,
        description="Name of the site in all tables and files: letters, digits, '.', '_' and '-'.",
    )
    public_key: str = Field(
        "",
        description="Public key of a site that made its own private key: the line that `polyclinic "
        "site keygen` prints; empty: the coordinator makes the key and puts it into the kit.",
    )

    @field_validator("public_key")
    @classmethod
    def _is_one_line(cls, value: str) -> str:
        if value and not value.startswith("ecdsa-sha2-nistp"):
            raise ValueError(
                "public-key: expected the line that `polyclinic site keygen` printed, starting "
                f"with ecdsa-sha2-nistp384, got {value[:40]!r}"
            )
        return " ".join(value.split()[:2])


class FederationConfig(Section):
    """A federation: its server, its sites and the validity of their certificates."""

    name: str = Field(
        pattern=NAME, description="Name of the federation: letters, digits, '.', '_' and '-'."
    )
    server: ServerAddress = Field(description="Address of the coordinator.")
    sites: tuple[Member, ...] = Field(min_length=1, description="Sites of the federation.")
    days: int = Field(365, ge=1, le=3650, description="Validity of new certificates, in days.")
    release_signer: str = Field(
        "",
        description="Ed25519 public key of the person who signs releases, one line as OpenSSH "
        "writes it. It goes into the sites' kits; empty: releases are not signed.",
    )

    @model_validator(mode="after")
    def _names_are_different(self) -> Self:
        names = [site.name.lower() for site in self.sites]
        reserved = sorted(set(names) & set(RESERVED))
        if reserved:
            raise ValueError(
                f"sites: expected names other than {', '.join(RESERVED)}, got {reserved[0]}"
            )
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"sites: expected distinct names, got {', '.join(repeated)} twice")
        keys = [site.public_key for site in self.sites if site.public_key]
        if len(keys) != len(set(keys)):
            raise ValueError("sites: expected distinct public-keys, got the same one for two sites")
        return self


def read_federation(path: Path) -> FederationConfig:
    """Read and check a ``federation.yaml``.

    Raises:
        ConfigError: if the file is missing, is not valid YAML, or has unknown or invalid keys.
    """
    return read_yaml(path, FederationConfig, "federation file", "name, server and sites")


def is_ip(name: str) -> bool:
    """Return whether a server's name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
