"""Compute the release digest of the running code, from any installation.

The digest equals the one that ``polyclinic site approve`` shows for a packed app
(``configs.security.release``). The check inside the app (``client.policy.site_policy``) only
protects against mistakes of an honest coordinator, since a dishonest one could ship code without
it. The check outside the app (``client.node.supernode``) prevents unapproved code from running.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.security.release import PROJECT, digest_of

PACKAGES = ("client", "configs", "mtl_model", "server", "simulation")
FILES = ("LICENSE", "apps.py", "polyclinic.py", PROJECT)  # other files in a packed app


@lru_cache(maxsize=1)
def own_release() -> str:
    """Compute the digest of the running code."""
    return release_of_folder(Path(__file__).resolve().parents[2])


def release_of_folder(root: Path) -> str:
    """Compute the digest of a checkout or of an unpacked app.

    Raises:
        ConfigError: if the folder lacks a file of a packed app.
    """
    paths = [root / name for name in FILES]
    for package in PACKAGES:
        paths += [p for p in (root / package).rglob("*") if p.suffix in (".py", ".toml")]
    try:
        return digest_of({p.relative_to(root).as_posix(): p.read_bytes() for p in paths})
    except FileNotFoundError as error:
        raise ConfigError(
            f"{root}: expected a checkout or an unpacked app, found no {error.filename}"
        ) from None
