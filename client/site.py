"""Which site this is, and its data.

A deployed site is named and placed by its own ``site.yaml`` (Flower's node config:
``site-config="/path/site.yaml"``). A simulated one is the partition-th site of the folder that
the run names, or a phantom hospital if it names none.
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

# Writes that many phantom hospitals, unless they are there, and says where.
PhantomRoot = Callable[[PhantomConfig, int], Path]


@dataclass(frozen=True)
class Site:
    """Who a site is, where its images lie, and what it allows."""

    manifest: Manifest
    policy: PolicyConfig
    config: SiteConfig | None  # None: simulated


def open_site(node: Mapping[str, object], config: RunConfig, phantom_root: PhantomRoot) -> Site:
    """Find the site that this process stands for.

    Raises:
        DataError: if its manifest cannot be used, or if the number of sites is not the number
            simulated.
        ConfigError: if its site.yaml cannot be used.
    """
    if SITE_CONFIG in node:
        own = read_site_config(Path(str(node[SITE_CONFIG])))
        return Site(read_site(own.data_root, own.name), own.policy, own)
    return Site(_simulated(node, config, phantom_root), OPEN, None)


def load(site: Site, data: DataConfig) -> SiteData:
    """Read a site's images, or take them from memory if nothing has changed.

    Raises:
        DataError: if they cannot be used.
        ConfigError: if a private site's split key cannot be used.
    """
    key = split_key(site.config.state) if site.config and site.config.private else None
    edited = site.manifest.path.stat().st_mtime_ns
    return restrict_to_allowed_tasks(site.policy, _loaded(site.manifest, data, edited, key))


@dataclass(frozen=True)
class PrivacyDeclaration:
    """What a site declares of the patients it trains on, and the ledger of what they have spent.

    Declared, not counted: numbers that follow from the images may not leave a site that trains
    privately. A simulated site, whose patients nobody protects, declares what it has.
    """

    run: str  # identity of the run that asks
    cohort: str
    examples: int  # training images
    patients: int
    ledger: Path
    budget: BudgetConfig | None  # None: no cap

    def units(self, unit: str) -> int:
        return self.examples if unit == "example" else self.patients


@dataclass(frozen=True)
class BudgetReport:
    """What a round did to its cohort's budget: epsilon at delta, of all that was ever spent."""

    before: float
    after: float
    delta: float
    cap: float | None  # the most that may ever be spent; None of a site without a budget


def standing(site: Site, data: SiteData, run: str, ledgers: Path) -> PrivacyDeclaration:
    """Find out what a site declares.

    Args:
        run: identity of the run; simulated sites' ledgers are of one run each.
        ledgers: folder for simulated sites' ledgers.

    Raises:
        ConfigError: if a deployed site's site.yaml does not declare its cohort.
    """
    if site.config is not None:
        own, cohort = site.config, site.config.cohort or CohortConfig()
        if cohort.examples is None or cohort.patients is None or own.budget is None:
            raise ConfigError(
                f"site {own.name}: expected cohort (examples, patients) and budget (epsilon, "
                "delta, unit) in its site.yaml, without which it does not train privately; "
                "docs/privacy.md has both"
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
    """Where a site keeps what it remembers of runs, a folder each.

    Args:
        memories: folder for simulated sites' memories.
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
            "name fewer in data.sites"
        )
    return list(sites.values())[partition]


@lru_cache(maxsize=16)
def _loaded(manifest: Manifest, data: DataConfig, _edited: int, key: bytes | None) -> SiteData:
    return load_site(manifest, data, key)
