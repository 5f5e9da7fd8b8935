"""Phantom hospitals: reproducible, different from each other, and written atomically."""

import csv
import dataclasses
import itertools
import os
import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from polyclinic.simulation.phantom import writer
from polyclinic.simulation.phantom.physics import PhantomExample, draw_example
from polyclinic.simulation.phantom.sites import PhantomSite, phantom_site
from polyclinic.simulation.phantom.writer import write_phantoms, write_site


def draw(number: int, count: int, *, size: int = 64, **options: float) -> list[PhantomExample]:
    site = phantom_site(number)
    return [draw_example(site, index, seed=0, size=size, **options) for index in range(count)]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write(folder: Path, *, examples: int = 4, size: int = 32, **options: bool | float) -> None:
    write_site(folder, phantom_site(1), examples=examples, seed=0, size=size, **options)


@pytest.fixture(scope="module")
def lesions() -> dict[str, list[PhantomExample]]:
    """Draw examples of four sites and group them by class."""
    found: dict[str, list[PhantomExample]] = {"benign": [], "malignant": []}
    for number in (1, 2, 3, 4):
        for example in draw(number, 36, size=96):
            found[example.label].append(example)
    return found


def extent(mask: np.ndarray) -> tuple[int, int]:
    """Return height and width of the lesion's bounding box in pixels."""
    rows, columns = np.nonzero(mask)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def solidity(mask: np.ndarray) -> float:
    """Return the area divided by that of the convex hull: 1 for an ellipse."""
    borders, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    border = max(borders, key=cv2.contourArea)
    return cv2.contourArea(border) / cv2.contourArea(cv2.convexHull(border))


def test_draw_example_is_deterministic() -> None:
    first, second = draw(2, 3), draw(2, 3)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.mask, other.mask)
        assert (one.label, one.group) == (other.label, other.group)


def test_example_does_not_depend_on_the_number_of_examples(tmp_path: Path) -> None:
    write(tmp_path / "few", examples=5)
    write(tmp_path / "many", examples=9)
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 10
    assert all(few[name] == many[name] for name in pictures)
    assert rows_of(tmp_path / "few") == rows_of(tmp_path / "many")[:5]


def test_write_phantoms_is_reproducible_bytewise(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_phantoms(tmp_path / name, sites=2, examples=3, seed=5, size=32)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize(("number", "index", "seed"), [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_lesion_differs_by_site_index_and_seed(number: int, index: int, seed: int) -> None:
    scanner = phantom_site(1)  # the same for all, so that only the random draw differs
    base = draw_example(scanner, 0, seed=0, size=48)
    other = draw_example(dataclasses.replace(scanner, number=number), index, seed=seed, size=48)
    assert not np.array_equal(base.image, other.image)
    assert not np.array_equal(base.mask, other.mask)


def test_phantom_site_depends_only_on_number_and_seed() -> None:
    assert phantom_site(7, seed=3) == phantom_site(7, seed=3)
    assert phantom_site(7, seed=3) != phantom_site(7, seed=4)
    assert phantom_site(7).name == "site-7"


def test_sites_differ_in_brightness_contrast_grain_and_shape() -> None:
    def grain(image: np.ndarray) -> float:
        """Return the correlation of horizontal neighbours after high-pass filtering."""
        fine = image - cv2.GaussianBlur(image, (0, 0), 3)
        return float(np.corrcoef(fine[:, 1:].ravel(), fine[:, :-1].ravel())[0, 1])

    shapes, statistics = [], []
    for number in (1, 2, 3):
        images = [example.image.astype(np.float32) for example in draw(number, 12, size=96)]
        shapes.append(images[0].shape)
        statistics.append(
            [
                np.mean([image.mean() for image in images]),
                np.mean([image.std() for image in images]),
                100 * np.mean([grain(image) for image in images]),
            ]
        )
    assert len(set(shapes)) == 3
    for one in range(3):
        for other in range(one):
            assert np.abs(np.subtract(statistics[one], statistics[other])).max() > 10


def test_sites_differ_in_class_mix_and_number_of_examples() -> None:
    sites = [phantom_site(number) for number in (1, 2, 3)]
    shares = [np.mean([e.label == "benign" for e in draw(s.number, 60, size=32)]) for s in sites]
    assert max(shares) - min(shares) > 0.08
    assert max(site.volume for site in sites) > 1.4 * min(site.volume for site in sites)


def test_small_site_has_both_classes() -> None:
    for number in range(1, 9):
        assert {example.label for example in draw(number, 8, size=32)} == {"benign", "malignant"}


def test_images_are_grey_and_match_size_on_the_long_side() -> None:
    for number in (1, 2, 3, 4):
        for size in (33, 128):
            image = draw(number, 1, size=size)[0].image
            assert max(image.shape) == size
            assert min(image.shape) > size / 2
            assert image.dtype == np.uint8
            assert image.std() > 10


def test_masks_match_their_image_and_are_binary(lesions: dict[str, list[PhantomExample]]) -> None:
    for example in lesions["benign"] + lesions["malignant"]:
        assert example.mask.shape == example.image.shape
        assert example.mask.dtype == np.uint8
        assert set(np.unique(example.mask)) == {0, 255}


def test_lesion_survives_resizing_to_64_pixels(lesions: dict[str, list[PhantomExample]]) -> None:
    for example in lesions["benign"] + lesions["malignant"]:
        small = cv2.resize(example.mask, (64, 64), interpolation=cv2.INTER_NEAREST)
        assert 9 <= min(extent(small)) <= 40


def test_benign_lesions_are_wide_and_malignant_ones_tall(
    lesions: dict[str, list[PhantomExample]],
) -> None:
    def mean_height_to_width(label: str) -> float:
        extents = [extent(example.mask) for example in lesions[label]]
        return float(np.mean([height / width for height, width in extents]))

    assert mean_height_to_width("benign") < 0.85
    assert mean_height_to_width("malignant") > 1.1


def test_malignant_borders_are_less_regular(lesions: dict[str, list[PhantomExample]]) -> None:
    benign = [solidity(example.mask) for example in lesions["benign"]]
    malignant = [solidity(example.mask) for example in lesions["malignant"]]
    assert np.mean(benign) > 0.95
    assert np.mean(malignant) < np.mean(benign) - 0.04
    assert np.median(malignant) < np.percentile(benign, 10)


def test_lesions_are_darker_than_their_surroundings(
    lesions: dict[str, list[PhantomExample]],
) -> None:
    for examples in lesions.values():
        darker = []
        for example in examples:
            around = cv2.dilate(example.mask, np.ones((9, 9))) > example.mask
            darker.append(example.image[example.mask > 0].mean() < example.image[around].mean())
        assert np.mean(darker) > 0.9


def test_malignant_lesions_cast_a_shadow(lesions: dict[str, list[PhantomExample]]) -> None:
    def below_against_beside(example: PhantomExample) -> float:
        rows, columns = np.nonzero(example.mask)
        band = example.image[rows.max() + 2 : rows.max() + 10].astype(float)
        under = np.zeros(band.shape[1], bool)
        under[int(np.percentile(columns, 25)) : int(np.percentile(columns, 75))] = True
        return float(band[:, under].mean() - band[:, ~under].mean())

    benign, malignant = (
        np.mean([below_against_beside(example) for example in lesions[label]])
        for label in ("benign", "malignant")
    )
    assert malignant < benign - 15


def test_no_global_threshold_segments_the_lesion(
    lesions: dict[str, list[PhantomExample]],
) -> None:
    def dice(guess: np.ndarray, mask: np.ndarray) -> float:
        return float(2 * np.sum(guess & mask) / (np.sum(guess) + np.sum(mask)))

    examples = lesions["benign"] + lesions["malignant"]
    for threshold in range(10, 160, 10):
        found = [dice(example.image < threshold, example.mask > 0) for example in examples]
        assert np.mean(found) < 0.5


def test_normal_examples_have_empty_masks_and_the_requested_rate() -> None:
    examples = draw(1, 60, size=32, normal_fraction=0.3)
    normal = [example for example in examples if example.label == "normal"]
    assert 0.2 < len(normal) / len(examples) < 0.4
    for example in examples:
        assert example.mask.any() == (example.label != "normal")


def test_one_patient_in_five_has_two_images_of_one_class() -> None:
    examples = draw(2, 60, size=32)
    views: dict[str, list[str]] = {}
    for example in examples:
        views.setdefault(example.group, []).append(example.label)
    counts = [len(labels) for labels in views.values()]
    assert (counts.count(1), counts.count(2)) == (40, 10)
    assert all(len(set(labels)) == 1 for labels in views.values())
    assert all(group.startswith("site-2-p") for group in views)


def test_images_of_one_patient_differ() -> None:
    examples = draw(1, 6, size=48)
    pairs = [(a, b) for a, b in itertools.pairwise(examples) if a.group == b.group]
    assert len(pairs) == 1
    assert not np.array_equal(pairs[0][0].image, pairs[0][1].image)
    assert not np.array_equal(pairs[0][0].mask, pairs[0][1].mask)


def test_written_site_matches_drawn_examples(tmp_path: Path) -> None:
    folder = tmp_path / "site-1"
    write(folder, examples=6, normal_fraction=0.4)
    rows = rows_of(folder)
    header = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "image,mask,label,group"
    assert {path.name for path in folder.iterdir()} == {"images", "masks", "labels.csv"}
    for index, row in enumerate(rows):
        example = draw_example(phantom_site(1), index, seed=0, size=32, normal_fraction=0.4)
        assert row["image"] == f"images/{index:04d}.png"
        assert row["mask"] == f"masks/{index:04d}.png"
        assert (row["label"], row["group"]) == (example.label, example.group)
        with Image.open(folder / row["image"]) as image, Image.open(folder / row["mask"]) as mask:
            assert np.array_equal(np.asarray(image), example.image)
            assert np.array_equal(np.asarray(mask), example.mask)
    assert {row["label"] for row in rows} == {"benign", "malignant", "normal"}


def test_site_without_masks_has_no_folder_and_blank_cells(tmp_path: Path) -> None:
    write(tmp_path / "site-1", masks=False)
    assert not (tmp_path / "site-1" / "masks").exists()
    rows = rows_of(tmp_path / "site-1")
    assert [row["mask"] for row in rows] == [""] * 4
    assert all(row["label"] for row in rows)


def test_site_without_labels_has_blank_cells_and_masks(tmp_path: Path) -> None:
    write(tmp_path / "site-1", labels=False)
    rows = rows_of(tmp_path / "site-1")
    assert [row["label"] for row in rows] == [""] * 4
    assert all((tmp_path / "site-1" / row["mask"]).is_file() for row in rows)


def test_write_phantoms_writes_one_folder_per_site(tmp_path: Path) -> None:
    write_phantoms(
        tmp_path / "deep" / "root",
        sites=3,
        examples=5,
        seed=1,
        size=32,
        without_masks=["site-2"],
        without_labels={"site-3"},
    )
    root = tmp_path / "deep" / "root"
    assert {path.name for path in root.iterdir()} == {"site-1", "site-2", "site-3"}
    rows = {name: rows_of(root / name) for name in ("site-1", "site-2", "site-3")}
    assert {name for name in rows if not any(row["mask"] for row in rows[name])} == {"site-2"}
    assert {name for name in rows if not any(row["label"] for row in rows[name])} == {"site-3"}
    for number in (1, 2, 3):
        expected = round(5 * phantom_site(number, 1).volume)
        assert len(rows[f"site-{number}"]) == expected


def test_existing_site_is_not_changed(tmp_path: Path) -> None:
    folder = tmp_path / "site-1"
    write(folder)
    before = contents(folder)
    write(folder, examples=9, size=64, masks=False)
    assert contents(folder) == before


def test_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "site-1"
    folder.mkdir()
    (folder / "thesis.txt").write_text("do not lose")
    with pytest.raises(OSError, match="site-1"):
        write(folder)
    assert contents(tmp_path) == {"site-1/thesis.txt": b"do not lose"}
    assert [path.name for path in tmp_path.iterdir()] == ["site-1"]


def test_concurrent_writers_leave_one_complete_site(tmp_path: Path) -> None:
    folder, alone = tmp_path / "race" / "site-1", tmp_path / "alone"
    write(alone)
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def writer() -> None:
        start.wait()
        try:
            write(folder)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=writer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert contents(folder) == contents(alone)
    assert [path.name for path in folder.parent.iterdir()] == ["site-1"]


def test_writer_losing_the_race_keeps_the_winner_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, winner = tmp_path / "root" / "site-1", tmp_path / "winner"
    write(winner, examples=2)
    rename = os.rename

    def beaten(source: Path, target: Path) -> None:
        shutil.copytree(winner, target)
        rename(source, target)

    monkeypatch.setattr(writer.os, "rename", beaten)
    write(folder, examples=4)
    assert contents(folder) == contents(winner)
    assert [path.name for path in folder.parent.iterdir()] == ["site-1"]


def test_full_disk_raises_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(28, "No space left on device")
    write_bytes = Path.write_bytes

    def third_fails(path: Path, data: bytes) -> int:
        if path.name == "0002.png":
            raise full
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", third_fails)
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path / "site-1")
    assert caught.value is full
    assert list(tmp_path.iterdir()) == []


def test_written_site_has_default_permissions(tmp_path: Path) -> None:
    write(tmp_path / "site-1", examples=1)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "site-1").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 31}, "size: expected 32 pixels or more, got 31"),
        ({"examples": 0}, "examples: expected 1 or more, got 0"),
        ({"sites": 0}, "sites: expected 1 or more, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"normal_fraction": 1.0}, "normal_fraction: .* got 1.0"),
        ({"normal_fraction": -0.1}, "normal_fraction: .* got -0.1"),
        ({"normal_fraction": float("nan")}, "normal_fraction: .* got nan"),
        ({"without_masks": ["site-3"]}, "without_masks: .*site-1, site-2, got site-3"),
        ({"without_labels": ["Site-1"]}, "without_labels: .*site-1, site-2, got Site-1"),
    ],
)
def test_invalid_arguments_are_refused_and_write_nothing(
    tmp_path: Path, options: dict[str, object], named: str
) -> None:
    settings: dict[str, object] = {"sites": 2, "examples": 2, "seed": 0, "size": 32} | options
    with pytest.raises(ValueError, match=named):
        write_phantoms(tmp_path / "root", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "root").exists()


def test_site_and_index_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="site number: expected 1 or more, got 0"):
        phantom_site(0)
    site: PhantomSite = phantom_site(1)
    with pytest.raises(ValueError, match="index: expected 0 or more, got -1"):
        draw_example(site, -1, seed=0, size=32)
