"""Opening a node's site: deployed by its site.yaml, or simulated by its partition number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyclinic.client.data.dataset import SiteData
from polyclinic.client.data.manifest import DataError
from polyclinic.client.site import load, open_site
from polyclinic.configs.schema.data import PhantomConfig
from tests.conftest import rows_of, write_manifest


def no_phantoms(_config: PhantomConfig, _sites: int) -> Path:
    raise AssertionError("no phantom hospital is wanted here")


def twelve() -> list[dict[str, str]]:
    return rows_of(6) + rows_of(6, "malignant")


def test_deployed_site_takes_name_and_folder_from_site_file(site_folder, tiny) -> None:
    folder = site_folder(twelve())
    path = folder.parent / "site.yaml"
    path.write_text(f"name: north\ndata-root: {folder.name}\n")
    # the run's data.root only applies to simulation
    config = tiny(data__root="/elsewhere")
    site = open_site({"site-config": str(path)}, config, no_phantoms)
    assert site.config is not None
    data = load(site, config.data)
    assert data.site == "north"
    assert sum(map(len, data.splits.values())) == 12


def test_simulated_sites_follow_folder_order(site_folder, tiny) -> None:
    for name in ("b", "a"):
        site_folder(twelve(), f"sites/{name}")
    config = tiny(data__root=str(site_folder(twelve(), "sites/c").parent))
    names = [
        open_site({"partition-id": i, "num-partitions": 3}, config, no_phantoms).manifest.site
        for i in range(3)
    ]
    assert names == ["a", "b", "c"]


def test_data_are_cached_until_the_manifest_changes(site_folder, tiny) -> None:
    folder = site_folder(twelve())
    config = tiny(data__root=str(folder))
    node = {"partition-id": 0, "num-partitions": 1}

    def data() -> SiteData:
        return load(open_site(node, config, no_phantoms), config.data)

    first = data()
    assert data() is first
    write_manifest(folder, twelve()[1:])
    os.utime(folder / "labels.csv", ns=(1, 1))
    assert sum(map(len, data().splits.values())) == 11


def test_node_without_site_config_or_partition_is_refused(tiny) -> None:
    with pytest.raises(DataError, match=r"expected site-config .* or partition-id .* got gpu"):
        open_site({"gpu": 1}, tiny(), no_phantoms)
