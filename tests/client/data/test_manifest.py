"""Reading a site's folder, and saying what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyclinic.client.data.manifest import DataError, chosen_sites, read_site, read_sites
from tests.conftest import rows_of, write_manifest


def test_a_folder_of_folders_is_a_site_each(site_folder, tmp_path: Path) -> None:
    site_folder(rows_of(2), "sites/north")
    site_folder(rows_of(3), "sites/east")
    sites = read_sites(tmp_path / "sites")
    assert {name: len(m.rows) for name, m in sites.items()} == {"east": 3, "north": 2}


def test_a_column_tells_the_sites_of_one_manifest_apart(site_folder) -> None:
    rows = [{**row, "site": "b" if i else "a"} for i, row in enumerate(rows_of(3))]
    folder = site_folder(rows)
    assert {name: len(m.rows) for name, m in read_sites(folder).items()} == {"a": 1, "b": 2}
    assert len(read_site(folder, "mine").rows) == 3


def test_a_manifest_alone_is_one_site_called_as_its_folder(site_folder) -> None:
    assert list(read_sites(site_folder(rows_of(2), "south"))) == ["south"]


def test_empty_cells_mean_not_annotated_and_a_group_is_the_image_by_default(site_folder) -> None:
    rows = [{"image": "a.png", "mask": "", "label": " ", "group": ""}]
    (row,) = read_sites(site_folder(rows))["site"].rows
    assert (row.mask, row.label, row.split, row.group, row.line) == (None, None, None, "a.png", 2)


def test_a_column_of_a_mask_class_is_kept_by_its_name(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "mask-mass": "m.png", "mask-vessel": " ", "mask-": ""}]
    write_manifest(tmp_path, rows)
    (row,) = read_sites(tmp_path)[tmp_path.name].rows
    assert row.masks_of == (("mass", tmp_path / "m.png"),)
    assert row.mask is None


def test_a_byte_order_mark_of_a_spreadsheet_is_no_part_of_the_header(site_folder) -> None:
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
    with pytest.raises(DataError, match=r"no site 'c'; the data hold a, b"):
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
def test_a_manifest_that_cannot_be_used_is_refused_by_row(
    tmp_path: Path, rows: list[dict[str, str]], said: str
) -> None:
    write_manifest(tmp_path, rows)
    with pytest.raises(DataError, match=said):
        read_sites(tmp_path)


def test_folders_that_hold_no_site_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: expected a folder, found none"):
        read_sites(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"expected labels.csv, or one folder a site"):
        read_sites(tmp_path)
    (tmp_path / "labels.csv").write_text("image\n")
    with pytest.raises(DataError, match="a header alone"):
        read_sites(tmp_path)
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(DataError, match="an empty file"):
        read_sites(tmp_path)
    (tmp_path / "labels.csv").write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_sites(tmp_path)
