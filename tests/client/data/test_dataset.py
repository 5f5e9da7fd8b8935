"""Loading a site's data: resizing, masks, unreadable rows, normalisation, augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.client.data.augment import Augmentation
from polyclinic.client.data.dataset import Example, ExampleDataset, load_site, to_batch
from polyclinic.client.data.manifest import DataError, read_sites
from polyclinic.configs.schema.data import DataConfig
from tests.conftest import rows_of, write_manifest

DATA = DataConfig(image_height=32, image_width=32)


def load(folder: Path, **changes: object):
    return load_site(read_sites(folder)[folder.name], DATA.model_copy(update=changes))


def ten(label: str = "benign") -> list[dict[str, str]]:
    return rows_of(6) + rows_of(6, "malignant")


def test_load_site_splits_resizes_and_counts(site_folder) -> None:
    site = load(site_folder(ten()))
    assert sum(map(len, site.splits.values())) == 12
    train = site.splits["train"]
    assert train.images.shape[1:] == (32, 32, 1)
    assert train.images.dtype == np.uint8
    assert set(np.unique(train.masks)) == {0, 1}
    assert train.masks.shape[1:] == (32, 32, 1)
    assert train.class_counts().sum() == len(train)
    assert train.tasks == ("segmentation", "classification")


def test_resize_pad_keeps_aspect_ratio_and_stretch_fills(site_folder) -> None:
    folder = site_folder(ten(), size=(20, 40))
    padded = load(folder).splits["train"].images[0, ..., 0]
    assert not padded[:8].any()
    assert not padded[24:].any()
    assert padded[8:24].any(axis=1).all()
    stretched = load(folder, resize="stretch").splits["train"].images[0, ..., 0]
    assert stretched.any(axis=1).all()


def test_colour_and_16_bit_images_are_converted_to_grey(tmp_path: Path) -> None:
    rows = rows_of(8)
    (tmp_path / "images").mkdir()
    for i, row in enumerate(rows):
        row["mask"] = ""
        colour = np.full((32, 32, 3), (255, 0, 0), np.uint8)
        deep = np.full((32, 32), 40_000, np.uint16)
        Image.fromarray(colour if i % 2 else deep).save(tmp_path / row["image"])
    write_manifest(tmp_path, rows)
    grey = {int(v) for e in load(tmp_path).splits.values() for v in e.images[:, 16, 16, 0]}
    assert grey == {40_000 >> 8, 76}  # 76: luma of red
    assert load(tmp_path, channels=3).splits["train"].images.shape[-1] == 3


def test_mask_values_1_and_255_load_equally(site_folder) -> None:
    folder = site_folder(ten())
    before = load(folder)
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.minimum(np.asarray(Image.open(path)), 1)).save(path)
    assert load(folder).fingerprint == before.fingerprint


@pytest.mark.parametrize("mode", ["16 bit", "palette", "rgba", "1 bit"])
def test_mask_of_any_pixel_mode_loads_equally(site_folder, mode: str) -> None:
    folder = site_folder(ten())
    before = load(folder)
    for path in (folder / "masks").iterdir():
        inside = np.asarray(Image.open(path)) > 0
        if mode == "16 bit":
            other = Image.fromarray(inside.astype(np.uint16))
        elif mode == "palette":
            other = Image.fromarray(inside.astype(np.uint8)).convert("P")
            other.putpalette([0, 0, 0, 200, 0, 0])
        elif mode == "rgba":
            other = Image.fromarray(np.stack([inside * 9] * 3 + [inside * 0 + 255], 2).astype("u1"))
        else:
            other = Image.fromarray(inside)
        other.save(path)
    assert load(folder).fingerprint == before.fingerprint


def test_partially_annotated_rows_keep_the_other_task(site_folder) -> None:
    rows = ten()
    for row in rows:
        row["mask"] = ""
    masks_gone = load(site_folder(rows, "a")).splits["train"]
    assert masks_gone.tasks == ("classification",)
    rows = ten()
    for row in rows:
        row["label"] = ""
    labels_gone = load(site_folder(rows, "b")).splits["train"]
    assert labels_gone.tasks == ("segmentation",)
    assert not labels_gone.has_label.any()
    assert not labels_gone.labels.any()


def break_image(folder: Path) -> None:
    path = folder / "images/benign0.png"
    path.write_bytes(path.read_bytes()[:200])


def lose_image(folder: Path) -> None:
    (folder / "images/benign0.png").unlink()


def no_image(folder: Path) -> None:
    (folder / "images/benign0.png").write_text("<html>")


def too_deep(folder: Path) -> None:
    pixels = np.linspace(0, 1, 40 * 48, dtype=np.float32).reshape(40, 48)
    Image.fromarray(pixels).save(folder / "images/benign0.png", format="tiff")


def lose_mask(folder: Path) -> None:
    (folder / "masks/benign0.png").unlink()


def other_size(folder: Path) -> None:
    Image.new("L", (9, 7)).save(folder / "masks/benign0.png")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (too_deep, r"image .*benign0.png: 32 bits per pixel: expected 8 or 16"),
        (break_image, r"image .*benign0.png: cannot be decoded"),
        (no_image, r"image .*benign0.png: cannot be decoded"),
        (lose_image, r"image .*benign0.png: no such file"),
        (lose_mask, r"mask .*benign0.png: no such file"),
        (other_size, r"mask .*: expected the image's size, 48 x 40, got 9 x 7"),
    ],
)
def test_unreadable_row_is_skipped_and_reported_or_refused(site_folder, harm, said: str) -> None:
    folder = site_folder(ten())
    harm(folder)
    site = load(folder)
    assert sum(map(len, site.splits.values())) == 11
    (sentence,) = site.skipped
    with pytest.raises(DataError, match=rf"row 2: {said}.*data.on-error is 'refuse'"):
        load(folder, on_error="refuse")
    assert sentence.startswith(f"{folder / 'labels.csv'}: row 2: ")


def test_truncated_jpeg_is_skipped(site_folder, tmp_path: Path) -> None:
    rows = [{**row, "image": row["image"].replace("png", "jpg")} for row in ten()]
    folder = site_folder(rows)
    path = folder / "images/benign0.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(load(folder).skipped) == 1


def test_site_with_only_unreadable_images_is_refused(site_folder) -> None:
    folder = site_folder(ten())
    for path in (folder / "images").iterdir():
        path.write_text("x")
    with pytest.raises(DataError, match="none of 12 images can be used; the first: "):
        load(folder)


def test_unknown_label_is_refused_and_lists_known_labels(site_folder) -> None:
    rows = ten()
    rows[3]["label"] = "benine"
    folder = site_folder(rows)
    with pytest.raises(DataError, match=r"row 5: label: expected benign, malignant .*'benine'"):
        load(folder)
    assert sum(map(len, load(folder, drop_labels=("benine",)).splits.values())) == 11


def test_fingerprint_changes_with_pixels(site_folder) -> None:
    folder = site_folder(ten())
    before = load(folder).fingerprint
    assert load(folder).fingerprint == before
    Image.new("L", (48, 40), 9).save(folder / "images/benign0.png")
    assert load(folder).fingerprint != before


def test_normalisation_per_image_and_with_fixed_scale() -> None:
    images = torch.randint(50, 90, (2, 8, 8, 1), dtype=torch.uint8)
    images[1] += 100
    known = torch.ones(2, dtype=torch.bool)
    labels = torch.eye(2, dtype=torch.uint8)
    batch = Example(images, torch.zeros_like(images), known[:, None], labels, known)
    x, targets = to_batch(batch, "image", torch.device("cpu"))
    assert x.shape == (2, 1, 8, 8)
    assert x.mean(dim=(1, 2, 3)).abs().max() < 1e-5
    assert targets.masks.shape == (2, 1, 8, 8)
    assert targets.labels.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    fixed, _ = to_batch(batch, "fixed", torch.device("cpu"))
    torch.testing.assert_close(fixed[0, 0], (images[0, ..., 0].float() / 255 - 0.5) / 0.25)
    blank, _ = to_batch(batch._replace(image=images * 0), "image", torch.device("cpu"))
    assert not blank.any()


def test_augmentation_is_seeded_and_moves_image_with_mask() -> None:
    mask = np.zeros((32, 32, 1), np.uint8)
    mask[4:16, 8:20] = 1
    image = mask * np.uint8(200)
    first = [Augmentation(3)(image, mask, i) for i in range(8)]
    again = [Augmentation(3)(image, mask, i) for i in reversed(range(8))][::-1]
    for (a, b), (c, d) in zip(first, again, strict=True):
        assert np.array_equal(a, c)
        assert np.array_equal(b, d)
        overlap = ((a > 100) & (b == 1)).sum() / (b == 1).sum()
        assert overlap > 0.85
    assert len({b.tobytes() for _, b in first}) > 4
    assert not np.array_equal(first[0][1], Augmentation(4)(image, mask, 0)[1])


def test_dataset_index_returns_matching_example(site_folder) -> None:
    examples = load(site_folder(ten())).splits["train"]
    example = ExampleDataset(examples)[2]
    assert torch.equal(example.image, torch.from_numpy(examples.images[2]))
    assert example.masks.shape == (32, 32, 1)
    assert example.has_mask.tolist() == [True]
    assert example.labels.tolist() == examples.labels[2].tolist()
    assert example.has_label.item() is True
