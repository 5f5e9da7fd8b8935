"""The real images of three hospitals next to the checkout; skipped where they are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from polyclinic.client.data.dataset import load_site
from polyclinic.client.data.manifest import read_sites
from polyclinic.client.data.splits import split_rows
from polyclinic.configs.schema.data import DataConfig
from polyclinic.server.app import run
from polyclinic.server.runs.history import POOLED, read_history

DATA = DataConfig(image_height=64, image_width=64, drop_labels=("normal",))


def test_real_images_are_read_and_split_by_patient(real_images: Path) -> None:
    sites = read_sites(real_images)
    assert {name: len(m.rows) for name, m in sites.items()} == {
        "breast": 100,
        "busbra": 100,
        "busi": 100,
    }
    for manifest in sites.values():
        site = load_site(manifest, DATA)
        assert not site.skipped
        rows = [row for row in manifest.rows if row.label != "normal"]
        assert sum(map(len, site.splits.values())) == len(rows)
        for examples in site.splits.values():
            assert examples.has_mask.all()
            assert (examples.masks.mean(axis=(1, 2)) > 0.001).all()
            assert examples.images.std(axis=(1, 2, 3)).min() > 5
            assert examples.has_label.all()
            assert (examples.labels.sum(axis=1) == 1).all()
            assert examples.class_counts().all()
        groups = [{row.group for row in part} for part in split_rows(manifest, rows, DATA).values()]
        assert sum(map(len, groups)) == len(set().union(*groups))


def test_normal_images_have_an_empty_mask_and_no_lesion(real_images: Path) -> None:
    manifest = read_sites(real_images)["busi"]
    data = DATA.model_copy(update={"drop_labels": (), "classes": ("benign", "malignant", "normal")})
    site = load_site(manifest, data)
    counts = np.zeros(3, np.int64)
    for examples in site.splits.values():
        counts += examples.class_counts()
        normal = examples.labels[:, 2] == 1
        assert not examples.masks[normal].any()
        assert examples.has_mask[normal].all()
    assert counts.tolist() == [40, 40, 20]


def test_federation_trains_on_real_images(real_images: Path, tiny, grid) -> None:
    config = tiny(
        data__root=str(real_images),
        data__drop_labels="normal",
        train__batch_size=16,
        rounds__count=1,
    )
    folder = run(grid(config), config)
    metrics = {line.site: line.metrics for line in read_history(folder.history) if line.metrics}
    assert set(metrics) == {"breast", "busbra", "busi", POOLED}
    assert all(m.images == m.lesions == m.labelled for m in metrics.values())
