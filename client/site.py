"""Which site this is, and its data.

A deployed site is named and placed by its own ``site.yaml`` (Flower's node config:
``site-config="/path/site.yaml"``). A simulated one is the partition-th site of the folder that
the run names, or a phantom hospital if it names none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from client.dataset import SiteData, load_site
from client.manifest import DataError, Manifest, chosen_sites, read_site, read_sites
from configs.run import DataConfig, PhantomConfig, RunConfig
from configs.site import read_site_config

SITE_CONFIG = "site-config"
PARTITION = "partition-id"
PARTITIONS = "num-partitions"

# Writes that many phantom hospitals, unless they are there, and says where.
PhantomRoot = Callable[[PhantomConfig, int], Path]


def open_site(node: Mapping[str, object], config: RunConfig, phantom_root: PhantomRoot) -> SiteData:
    """Find out who this node is and load its examples; the same again from memory next time.

    Raises:
        DataError: if the data cannot be used.
        ConfigError: if site.yaml is missing or wrong.
    """
    manifest = _manifest(node, config, phantom_root)
    # A manifest that was edited between two rounds is read again.
    return _loaded(manifest, config.data, manifest.path.stat().st_mtime_ns)


def _manifest(node: Mapping[str, object], config: RunConfig, phantom_root: PhantomRoot) -> Manifest:
    if SITE_CONFIG in node:
        site = read_site_config(Path(str(node[SITE_CONFIG])))
        return read_site(site.data_root, site.name)
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
def _loaded(manifest: Manifest, data: DataConfig, _edited: int) -> SiteData:
    return load_site(manifest, data)
