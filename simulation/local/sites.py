"""Data of simulated sites: the configured folder, or phantom hospitals in the user's cache."""

from __future__ import annotations

import hashlib
import inspect
import os
from pathlib import Path

from polyclinic.client.data.manifest import DataError, Manifest, chosen_sites, read_sites
from polyclinic.configs.schema.data import DataConfig, PhantomConfig
from polyclinic.simulation.phantom import physics, writer
from polyclinic.simulation.phantom import sites as phantom_sites


def phantom_root(config: PhantomConfig, sites: int) -> Path:
    """Write phantom hospitals into the user's cache unless they exist, and return their folder.

    The folder's name contains a hash of everything that determines the images: the settings and the
    source code of the phantom modules.

    Args:
        config: the phantom settings.
        sites: number of sites, 1 or more.

    Raises:
        DataError: if the settings name a site that does not exist.
    """
    modules = (phantom_sites, physics, writer)
    source = "".join(inspect.getsource(module) for module in modules)
    shape = config.model_dump_json(exclude={"sites"}) + source
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
    """Return Polyclinic's folder in the user's cache (XDG base directories)."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "polyclinic"


def ledger_folder() -> Path:
    """Return the folder for the privacy ledgers of simulated sites, one ledger per run and site."""
    return cache_folder() / "ledgers"


def memory_folder() -> Path:
    """Return the folder for the state of simulated sites in a run, such as personal layers."""
    return cache_folder() / "runs"


def simulated_sites(data: DataConfig, phantoms: PhantomConfig) -> tuple[Path, dict[str, Manifest]]:
    """Find the sites of a simulation.

    Returns:
        The absolute path of the folder that contains the sites, and the manifest of each site.

    Raises:
        DataError: if the folder contains no site, or a configured site is missing.
    """
    root = Path(data.root).expanduser() if data.root else phantom_root(phantoms, phantoms.sites)
    return root.absolute(), chosen_sites(read_sites(root), data.sites)
