"""The data of simulated sites: a folder that the user names, or phantom hospitals in a cache."""

from __future__ import annotations

import hashlib
import inspect
import os
from pathlib import Path

from polyclinic.client.data.manifest import DataError, Manifest, chosen_sites, read_sites
from polyclinic.configs.schema.data import DataConfig, PhantomConfig
from polyclinic.simulation.phantom import writer


def phantom_root(config: PhantomConfig, sites: int) -> Path:
    """Write that many phantom hospitals into the user's cache, unless they are there.

    The folder is named by a hash of what shapes the images, the drawing code included.

    Raises:
        DataError: if the settings name a site that there is not.
    """
    shape = config.model_dump_json(exclude={"sites"}) + inspect.getsource(writer)
    digest = hashlib.sha256(shape.encode()).hexdigest()[:12]
    root = cache_folder() / "phantoms" / f"{digest}-{sites}"
    try:
        writer.write_phantoms(
            root,
            sites=sites,
            examples=config.examples,
            seed=config.seed,
            size=config.size,
            normal_fraction=config.normal_fraction,
            without_masks=config.without_masks,
            without_labels=config.without_labels,
        )
    except ValueError as error:
        raise DataError(f"phantom: {error}") from None
    return root


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again (XDG base directories)."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "polyclinic"


def ledger_folder() -> Path:
    """Where simulated sites keep their privacy ledgers, of one run each."""
    return cache_folder() / "ledgers"


def memory_folder() -> Path:
    """Where simulated sites keep what they remember of a run, such as personal layers."""
    return cache_folder() / "runs"


def simulated_sites(data: DataConfig, phantoms: PhantomConfig) -> tuple[Path, dict[str, Manifest]]:
    """The folder that a simulation's sites lie in, absolute, and their manifests.

    Raises:
        DataError: if it holds no site, or one that was asked for is not there.
    """
    root = Path(data.root).expanduser() if data.root else phantom_root(phantoms, phantoms.sites)
    return root.absolute(), chosen_sites(read_sites(root), data.sites)
