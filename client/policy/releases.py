"""Which code a site runs: the digest of the release it is, wherever it lies.

The same that ``polyclinic site approve`` shows of a packed app (``configs.security.release``). The
check inside the app (``client.policy.site_policy``) binds an honest coordinator: a dishonest one
could ship code without it. What keeps unapproved code from running at all stands outside the app
(``client.node.supernode``).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.security.release import PROJECT, digest_of

ROOMS = ("client", "configs", "mtl_model", "server", "simulation")
BESIDE = (
    "LICENSE",
    "apps.py",
    "polyclinic.py",
    PROJECT,
)  # of a folder's other files, what a packed app holds


@lru_cache(maxsize=1)
def own_release() -> str:
    """The digest of the code that is running."""
    return release_of_folder(Path(__file__).resolve().parents[2])


def release_of_folder(root: Path) -> str:
    """The digest of a checkout or of an unpacked app.

    Raises:
        ConfigError: if it lacks what a packed app holds.
    """
    paths = [root / name for name in BESIDE]
    for room in ROOMS:
        paths += [p for p in (root / room).rglob("*") if p.suffix in (".py", ".toml")]
    try:
        return digest_of({p.relative_to(root).as_posix(): p.read_bytes() for p in paths})
    except FileNotFoundError as error:
        raise ConfigError(
            f"{root}: expected a checkout or an unpacked app, found no {error.filename}"
        ) from None
