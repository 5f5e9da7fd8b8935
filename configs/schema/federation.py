"""Who takes part: ``federation.yaml``, from which the coordinator makes a kit for each."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from polyclinic.configs.ports import PUBLIC
from polyclinic.configs.schema.base import Section
from polyclinic.configs.schema.site import NAME, read_yaml

FEDERATION = "federation.yaml"
RESERVED = ("authority", "pooled", "server")  # stand for something else beside sites' names
HOST = r"^[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?$"


class ServerAddress(Section):
    """Where sites find the coordinator."""

    address: str = Field(pattern=HOST, description="A name or an IP address, as sites see it.")
    port: int = Field(PUBLIC, ge=1, le=65535)
    also: tuple[str, ...] = Field((), description="Other names and addresses of the same server.")

    @property
    def names(self) -> tuple[str, ...]:
        """What the server's certificate is for."""
        return tuple(dict.fromkeys((self.address, *self.also)))


class Member(Section):
    """One site of a federation."""

    name: str = Field(pattern=NAME, description="As in all tables.")
    public_key: str = Field(
        "", description="Of a site that made its own key (`polyclinic site keygen`), one line."
    )

    @field_validator("public_key")
    @classmethod
    def _is_one_line(cls, value: str) -> str:
        if value and not value.startswith("ecdsa-sha2-nistp"):
            raise ValueError(
                "public-key: expected the line that `polyclinic site keygen` printed, which begins "
                f"with ecdsa-sha2-nistp384, got {value[:40]!r}"
            )
        return " ".join(value.split()[:2])


class FederationConfig(Section):
    """A consortium: its server, its sites, and how long what they are given holds."""

    name: str = Field(pattern=NAME)
    server: ServerAddress
    sites: tuple[Member, ...] = Field(min_length=1)
    days: int = Field(365, ge=1, le=3650, description="For which certificates are valid.")
    release_signer: str = Field(
        "", description="Ed25519 public key of whoever signs releases, one line; goes into kits."
    )

    @model_validator(mode="after")
    def _names_are_different(self) -> Self:
        names = [site.name.lower() for site in self.sites]
        taken = sorted(set(names) & set(RESERVED))
        if taken:
            raise ValueError(f"sites: no site may be called {', '.join(RESERVED)}, got {taken[0]}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"sites: expected different names, got {', '.join(twice)} twice")
        keys = [site.public_key for site in self.sites if site.public_key]
        if len(keys) != len(set(keys)):
            raise ValueError("sites: two sites have the same public-key; each needs its own")
        return self


def read_federation(path: Path) -> FederationConfig:
    """Read and check a ``federation.yaml``.

    Raises:
        ConfigError: if it is missing, is not YAML, or has unknown or wrong keys.
    """
    return read_yaml(path, FederationConfig, "federation file", "name, server and sites")


def is_ip(name: str) -> bool:
    """Whether a server's name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
