"""Identify the site that this process represents, and load its data.

A deployed site takes its name and paths from its own ``site.yaml`` (Flower's node config:
``site-config="/path/site.yaml"``). A simulated site is one of the sites in the run's data folder,
selected by the partition number, or a phantom hospital if the run has no data folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from polyclinic.client.data.dataset import SiteData, load_site
from polyclinic.client.data.manifest import DataError, Manifest, chosen_sites, read_site, read_sites
from polyclinic.client.data.split_key import split_key
from polyclinic.client.ledger.budget import LEDGER
from polyclinic.client.policy.site_policy import OPEN, restrict_to_allowed_tasks
from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.data import DataConfig, PhantomConfig
from polyclinic.configs.schema.site import (
    BudgetConfig,
    CohortConfig,
    PolicyConfig,
    SiteConfig,
    read_site_config,
)

SITE_CONFIG = "site-config"
PARTITION = "partition-id"
PARTITIONS = "num-partitions"

# Generates the given number of phantom hospitals, if needed, and returns their folder.
PhantomRoot = Callable[[PhantomConfig, int], Path]


@dataclass(frozen=True)
class Site:
    """A site's manifest, policy and settings."""

    manifest: Manifest
    policy: PolicyConfig
    config: SiteConfig | None  # contents of site.yaml; None: simulated site


def open_site(node: Mapping[str, object], config: RunConfig, phantom_root: PhantomRoot) -> Site:
    """Open the site that this process represents.

    Args:
        node: Flower's node config.
        config: the run's configuration.
        phantom_root: generates phantom data for simulated sites.

    Raises:
        DataError: if the manifest cannot be used, or if the data folder's number of sites differs
            from the number of simulated sites.
        ConfigError: if the site.yaml cannot be used.
    """
    if SITE_CONFIG in node:
        own = read_site_config(Path(str(node[SITE_CONFIG])))
        return Site(read_site(own.data_root, own.name), own.policy, own)
    return Site(_simulated(node, config, phantom_root), OPEN, None)


def load(site: Site, data: DataConfig) -> SiteData:
    """Read a site's images; use the cached ones if the manifest has not changed.

    Raises:
        DataError: if the images cannot be used.
        ConfigError: if a private site's split key cannot be used.
    """
    key = split_key(site.config.state) if site.config and site.config.private else None
    edited = site.manifest.path.stat().st_mtime_ns
    return restrict_to_allowed_tasks(site.policy, _loaded(site.manifest, data, edited, key))


@dataclass(frozen=True)
class PrivacyDeclaration:
    """The numbers that a site declares about its training data, with its ledger and budget.

    Declared numbers are used because true counts must not leave a site that trains with
    differential privacy. A simulated site has no patients to protect and declares its true counts.
    """

    run: str  # identity of the run, 32 hexadecimal digits
    cohort: str
    examples: int  # declared number of training images
    patients: int  # declared number of training patients
    ledger: Path
    budget: BudgetConfig | None  # None: no cap

    def units(self, unit: str) -> int:
        """Return the declared number of units, ``example`` or ``patient``."""
        return self.examples if unit == "example" else self.patients


@dataclass(frozen=True)
class BudgetReport:
    """The cohort's total spent epsilon before and after a round."""

    before: float  # epsilon of all rounds before this one
    after: float  # the same with this round
    delta: float
    cap: float | None  # largest total epsilon; None: the site has no budget


def privacy_declaration(site: Site, data: SiteData, run: str, ledgers: Path) -> PrivacyDeclaration:
    """Collect the numbers that a site declares for private training.

    Args:
        site: the site.
        data: its data.
        run: identity of the run; a simulated site has a separate ledger for each run.
        ledgers: folder for simulated sites' ledgers.

    Raises:
        ConfigError: if a deployed site's site.yaml lacks its cohort or budget.
    """
    if site.config is not None:
        own, cohort = site.config, site.config.cohort or CohortConfig()
        if cohort.examples is None or cohort.patients is None or own.budget is None:
            raise ConfigError(
                f"site {own.name}: expected cohort (examples, patients) and budget (epsilon, "
                "delta, unit) in its site.yaml, which private training requires; see "
                "docs/privacy.md"
            )
        return PrivacyDeclaration(
            run, own.cohort_name, cohort.examples, cohort.patients, own.state / LEDGER, own.budget
        )
    train = data.splits[wire.TRAIN_SPLIT]
    patients = len(set(train.group.tolist()))
    return PrivacyDeclaration(
        run, data.site, len(train), patients, ledgers / run / data.site / LEDGER, None
    )


def memory_folder(site: Site, memories: Path) -> Path:
    """Return the folder in which a site keeps state between rounds, with one subfolder per run.

    Args:
        site: the site.
        memories: the folder for simulated sites.
    """
    return site.config.state / "runs" if site.config is not None else memories


def _simulated(
    node: Mapping[str, object], config: RunConfig, phantom_root: PhantomRoot
) -> Manifest:
    if PARTITION not in node:
        raise DataError(
            f"node config: expected {SITE_CONFIG} (a deployed site) or {PARTITION} (a simulated "
            f"one), got {', '.join(map(str, node)) or 'nothing'}"
        )
    partition, partitions = int(str(node[PARTITION])), int(str(node[PARTITIONS]))
    if config.data.root:
        root = Path(config.data.root).expanduser()
    else:
        root = phantom_root(config.phantom, partitions)
    sites = chosen_sites(read_sites(root), config.data.sites)
    if len(sites) != partitions:
        raise DataError(
            f"{root.absolute()} has {len(sites)} sites ({', '.join(sites)}), but {partitions} are "
            f"simulated; add --federation-config 'num-supernodes={len(sites)}' to flwr run, or "
            "select fewer sites in data.sites"
        )
    return list(sites.values())[partition]


@lru_cache(maxsize=16)
def _loaded(manifest: Manifest, data: DataConfig, _edited: int, key: bytes | None) -> SiteData:
    return load_site(manifest, data, key)
