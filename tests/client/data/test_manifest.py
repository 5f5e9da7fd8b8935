"""Reading a site's manifest and refusing invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyclinic.client.data.manifest import DataError, chosen_sites, read_site, read_sites
from tests.conftest import rows_of, write_manifest


def test_read_sites_reads_one_site_per_subfolder(site_folder, tmp_path: Path) -> None:
    site_folder(rows_of(2), "sites/north")
    site_folder(rows_of(3), "sites/east")
    sites = read_sites(tmp_path / "sites")
    assert {name: len(m.rows) for name, m in sites.items()} == {"east": 3, "north": 2}


def test_site_column_separates_sites_of_one_manifest(site_folder) -> None:
    rows = [{**row, "site": "b" if i else "a"} for i, row in enumerate(rows_of(3))]
    folder = site_folder(rows)
    assert {name: len(m.rows) for name, m in read_sites(folder).items()} == {"a": 1, "b": 2}
    assert len(read_site(folder, "mine").rows) == 3


def test_single_manifest_is_one_site_named_after_its_folder(site_folder) -> None:
    assert list(read_sites(site_folder(rows_of(2), "south"))) == ["south"]


def test_empty_cells_are_none_and_group_defaults_to_image(site_folder) -> None:
    rows = [{"image": "a.png", "mask": "", "label": " ", "group": ""}]
    (row,) = read_sites(site_folder(rows))["site"].rows
    assert (row.mask, row.label, row.split, row.group, row.line) == (None, None, None, "a.png", 2)


def test_mask_class_columns_are_read_by_name(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "mask-mass": "m.png", "mask-vessel": " ", "mask-": ""}]
    write_manifest(tmp_path, rows)
    (row,) = read_sites(tmp_path)[tmp_path.name].rows
    assert row.masks_of == (("mass", tmp_path / "m.png"),)
    assert row.mask is None


def test_byte_order_mark_in_header_is_ignored(site_folder) -> None:
    folder = site_folder(rows_of(1))
    path = folder / "labels.csv"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert len(read_sites(folder)["site"].rows) == 1


def test_sites_are_chosen_by_name(site_folder, tmp_path: Path) -> None:
    site_folder(rows_of(1), "sites/a")
    site_folder(rows_of(1), "sites/b")
    sites = read_sites(tmp_path / "sites")
    assert list(chosen_sites(sites, ["b"])) == ["b"]
    assert list(chosen_sites(sites, [])) == ["a", "b"]
    with pytest.raises(DataError, match=r"no site 'c'; the data have a, b"):
        chosen_sites(sites, ["c"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"picture": "a.png"}], r"expected a column 'image'.* got picture"),
        ([{"image": ""}], "row 2: expected the path of an image"),
        ([{"image": "a.png", "split": "dev"}], "row 2: split: expected train, val, test.*'dev'"),
        ([{"image": "a.png"}, {"image": "b.png"}, {"image": "a.png"}], r"row 4: a.png .* row 2"),
    ],
)
def test_invalid_manifest_is_refused_with_row_number(
    tmp_path: Path, rows: list[dict[str, str]], said: str
) -> None:
    write_manifest(tmp_path, rows)
    with pytest.raises(DataError, match=said):
        read_sites(tmp_path)


def test_folders_without_a_valid_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: expected a folder, found none"):
        read_sites(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected labels.csv, or one folder per site"):
        read_sites(tmp_path)
    (tmp_path / "labels.csv").write_text("image\n")
    with pytest.raises(DataError, match="only a header"):
        read_sites(tmp_path)
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(DataError, match="an empty file"):
        read_sites(tmp_path)
    (tmp_path / "labels.csv").write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_sites(tmp_path)
