"""Loading masks of several classes and images with several labels."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyclinic.client.data.augment import Augmentation
from polyclinic.client.data.dataset import Examples, SiteData, load_site
from polyclinic.client.data.manifest import DataError, Manifest, Row, read_sites
from polyclinic.client.data.splits import split_rows
from polyclinic.configs.schema.data import DataConfig
from tests.conftest import rows_of, write_manifest
from tests.site_images import (
    SIDE,
    THINGS,
    planes_of,
    shown_in,
    write_exclusive_site,
    write_overlapping_site,
)

SIZE = {"image_height": 32, "image_width": 32}
EXCLUSIVE = DataConfig(
    **SIZE, mask_classes=THINGS, classes=THINGS, positive="scar", channels=3, split_seed=1
)
OVERLAPPING = EXCLUSIVE.model_copy(update={"mask_kind": "overlapping", "label_kind": "multi-label"})


def load(folder: Path, data: DataConfig, **changes: object) -> SiteData:
    return load_site(read_sites(folder)[folder.name], data.model_copy(update=changes))


def everything(site: SiteData) -> dict[str, np.ndarray]:
    parts = [vars(examples) for examples in site.splits.values()]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def only(folder: Path, data: DataConfig, **changes: object) -> Examples:
    """Load the training examples of a site without validation and test splits."""
    changes = {"val_fraction": 0.0, "test_fraction": 0.0, **changes}
    return load(folder, data, **changes).splits["train"]


def manifest_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_index_mask_becomes_one_plane_per_class(tmp_path: Path) -> None:
    write_exclusive_site(tmp_path / "a", 16)
    examples = only(tmp_path / "a", EXCLUSIVE, image_height=SIDE, image_width=SIDE)
    assert examples.masks.shape == (16, SIDE, SIDE, 3)
    assert examples.has_mask.shape == (16, 3)
    assert examples.has_mask.all()
    for number in range(16):
        assert np.array_equal(examples.masks[number], planes_of(number))
    assert EXCLUSIVE.mask_channels == 4
    assert OVERLAPPING.mask_channels == 3
    assert DataConfig().mask_channels == 1


def test_resized_index_mask_adds_no_class(tmp_path: Path) -> None:
    write_exclusive_site(tmp_path / "a", 16)
    examples = only(tmp_path / "a", EXCLUSIVE, image_height=32, image_width=48, resize="stretch")
    assert examples.masks.sum(axis=3).max() == 1
    for number in range(16):
        there = planes_of(number).any(axis=(0, 1))
        assert np.array_equal(examples.masks[number].any(axis=(0, 1)), there)


@pytest.mark.parametrize("mode", ["palette", "16 bit", "grey as colour", "alpha"])
def test_index_mask_of_any_pixel_mode_loads_equally(tmp_path: Path, mode: str) -> None:
    write_exclusive_site(tmp_path / "a", 16)
    before = load(tmp_path / "a", EXCLUSIVE).fingerprint
    for path in (tmp_path / "a/masks").iterdir():
        index = np.asarray(Image.open(path))
        if mode == "palette":
            other = Image.fromarray(index).convert("P")
            other.putdata(index.ravel().tolist())
            other.putpalette([0, 0, 0, 250, 9, 9, 9, 250, 9, 9, 9, 250])
        elif mode == "16 bit":
            other = Image.fromarray(index.astype(np.uint16))
        elif mode == "grey as colour":
            other = Image.fromarray(np.stack([index] * 3, axis=2))
        else:
            other = Image.fromarray(np.stack([index] * 3 + [np.full_like(index, 255)], axis=2))
        other.save(path)
    assert load(tmp_path / "a", EXCLUSIVE).fingerprint == before


def too_high(path: Path) -> None:
    Image.fromarray(np.full((SIDE, SIDE), 7, np.uint8)).save(path)


def in_colours(path: Path) -> None:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[..., 1] = 2
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (too_high, r"mask .*3.png: expected 0 background, 1 fluid, 2 scar, 3 cyst .*, got 7"),
        (in_colours, r"mask .*3.png: expected one class index per pixel, got colours"),
    ],
)
def test_invalid_index_mask_is_skipped_or_refused(tmp_path: Path, harm, said: str) -> None:
    write_exclusive_site(tmp_path / "a", 16)
    harm(tmp_path / "a/masks/3.png")
    site = load(tmp_path / "a", EXCLUSIVE)
    assert sum(map(len, site.splits.values())) == 15
    with pytest.raises(DataError, match=rf"row 5: {said}"):
        load(tmp_path / "a", EXCLUSIVE, on_error="refuse")


def test_overlapping_masks_load_per_class_with_missing_ones(tmp_path: Path) -> None:
    write_overlapping_site(tmp_path / "a", 16, annotated=("fluid", "cyst"))
    examples = only(tmp_path / "a", OVERLAPPING, image_height=SIDE, image_width=SIDE)
    assert (examples.has_mask == [True, False, True]).all()
    assert not examples.masks[..., 1].any()
    for number in range(16):
        assert np.array_equal(examples.masks[number, ..., ::2], planes_of(number)[..., ::2])
    assert examples.with_mask == 16
    assert examples.tasks == ("segmentation", "classification")


def test_unusable_overlapping_mask_is_reported_by_file(tmp_path: Path) -> None:
    write_overlapping_site(tmp_path / "a", 16)
    Image.new("L", (9, 7)).save(tmp_path / "a/masks/2-scar.png")
    (tmp_path / "a/masks/4-fluid.png").unlink()
    skipped = load(tmp_path / "a", OVERLAPPING).skipped
    assert "row 4: mask" in skipped[0]
    assert "2-scar.png: expected the image's size, 40 x 40, got 9 x 7" in skipped[0]
    assert "4-fluid.png: no such file" in skipped[1]


def test_mask_columns_not_matching_the_run_are_refused(tmp_path: Path) -> None:
    write_overlapping_site(tmp_path / "a", 16)
    one_mask = {"mask_kind": "exclusive"}
    with pytest.raises(DataError, match=r"expected masks in a column mask .* got only mask-cyst"):
        load(tmp_path / "a", OVERLAPPING, **one_mask)
    with pytest.raises(DataError, match=r"expected masks in columns mask-drusen .*mask-cyst"):
        load(tmp_path / "a", OVERLAPPING, mask_classes=("drusen",))
    write_exclusive_site(tmp_path / "b", 16)
    with pytest.raises(DataError, match=r"expected masks in columns mask-fluid, .* got mask$"):
        load(tmp_path / "b", EXCLUSIVE, mask_kind="overlapping")


def test_multi_label_cell_parses_names_none_and_empty(tmp_path: Path) -> None:
    write_overlapping_site(tmp_path / "a", 16)
    rows = manifest_rows(tmp_path / "a")
    rows[5]["label"] = ""
    rows[6]["label"] = " cyst ; scar"
    write_manifest(tmp_path / "a", rows)
    examples = only(tmp_path / "a", OVERLAPPING)
    assert examples.labels.dtype == np.uint8
    assert examples.has_label.tolist() == [number != 5 for number in range(16)]
    assert examples.labels[0].tolist() == [0, 0, 0]
    assert examples.labels[5].tolist() == [0, 0, 0]
    assert examples.labels[6].tolist() == [0, 1, 1]
    for number in (1, 2, 3, 4, 7, 8):
        assert examples.labels[number].tolist() == [t in shown_in(number) for t in THINGS]
    assert examples.class_counts().tolist() == examples.labels.sum(axis=0).tolist()


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("scar;drusen", r"row 5: label: expected fluid, scar, cyst .* got 'drusen'"),
        ("scar;none", r"got 'none'"),
        ("scar;", r"several joined by ';', none or nothing, got ''"),
    ],
)
def test_multi_label_cell_with_unknown_name_is_refused(
    tmp_path: Path, cell: str, said: str
) -> None:
    write_overlapping_site(tmp_path / "a", 16)
    rows = manifest_rows(tmp_path / "a")
    rows[3]["label"] = cell
    write_manifest(tmp_path / "a", rows)
    with pytest.raises(DataError, match=said):
        load(tmp_path / "a", OVERLAPPING)


def test_multi_label_row_with_a_dropped_label_is_dropped(tmp_path: Path) -> None:
    write_overlapping_site(tmp_path / "a", 16)
    fewer = {"classes": ("fluid", "scar"), "drop_labels": ("cyst",)}
    examples = only(tmp_path / "a", OVERLAPPING, **fewer)
    assert len(examples) == 8
    assert examples.labels.shape == (8, 2)


def test_exclusive_labels_refuse_multi_label_cells(tmp_path: Path) -> None:
    write_overlapping_site(tmp_path / "a", 16)
    with pytest.raises(DataError, match=r"row 2: label: expected .* got 'none'"):
        load(tmp_path / "a", OVERLAPPING, label_kind="exclusive")


def test_stratified_split_treats_label_sets_as_strata() -> None:
    cells = ["fluid;scar", "scar; fluid", "cyst", "none", None] * 20
    rows = tuple(
        Row(line, Path(f"{line}.png"), None, cell, f"g{line}", None)
        for line, cell in enumerate(cells)
    )
    manifest = Manifest("a", Path("labels.csv"), rows)
    splits = split_rows(manifest, rows, OVERLAPPING)
    names = {
        split: Counter(
            "+".join(sorted(row.labels("multi-label") or {row.label or "unknown"}))
            for row in members
        )
        for split, members in splits.items()
    }
    assert names["test"] == {"fluid+scar": 8, "cyst": 4, "none": 4, "unknown": 4}
    assert names["val"] == {"fluid+scar": 6, "cyst": 3, "none": 3, "unknown": 3}


@pytest.mark.parametrize("classes", [1, 2, 3, 6])
def test_augmentation_moves_all_mask_planes_together(classes: int) -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, classes + 1, (32, 40))
    masks = (index[..., None] == np.arange(1, classes + 1)).astype(np.uint8)
    image = np.zeros((32, 40, 1), np.uint8)
    changes = 0
    for i in range(12):
        _, together = Augmentation(3)(image, masks, i)
        assert together.shape == masks.shape
        assert together.sum(axis=2).max() <= 1  # classes stay mutually exclusive
        for k in range(classes):
            _, alone = Augmentation(3)(image, masks[..., k : k + 1], i)
            assert np.array_equal(together[..., k], alone[..., 0])
        changes += not np.array_equal(together, masks)
    assert changes > 6


def test_fourth_channel_is_kept_and_not_applied_as_alpha(tmp_path: Path) -> None:
    rows = rows_of(8)
    (tmp_path / "images").mkdir()
    for row in rows:
        row["mask"] = ""
        pixels = np.full((40, 40, 4), (200, 90, 30, 0), np.uint8)  # fully transparent
        Image.fromarray(pixels).save(tmp_path / row["image"])
    write_manifest(tmp_path, rows)
    examples = only(tmp_path, DataConfig(**SIZE), channels=4)
    assert (examples.images == (200, 90, 30, 0)).all()
    assert (only(tmp_path, DataConfig(**SIZE), channels=3).images == (200, 90, 30)).all()
    image, _ = Augmentation(0)(examples.images[0], examples.masks[0], 1)
    assert image.shape == (32, 32, 4)
