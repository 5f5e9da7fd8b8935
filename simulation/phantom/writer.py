"""Folders of phantom sites: images, masks and labels.csv."""

import csv
import os
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from polyclinic.simulation.phantom.physics import check_drawing, draw_example
from polyclinic.simulation.phantom.sites import PhantomSite, phantom_site

COLUMNS = ("image", "mask", "label", "group")


def write_site(  # noqa: PLR0913 settings of one call, each used by name
    folder: Path,
    site: PhantomSite,
    *,
    examples: int,
    seed: int,
    size: int,
    normal_fraction: float = 0.0,
    masks: bool = True,
    labels: bool = True,
) -> None:
    """Write the images, masks and labels.csv of a site; the folder appears complete or not at all.

    A folder that already contains labels.csv is not changed, even if it was written with other
    settings: to change a setting, write to another folder. Several processes may write the same
    site at the same time; the folder of one of them is kept.

    Args:
        folder: folder of the site.
        site: the site to write.
        examples: number of examples, 1 or more.
        seed: seed of the federation, 0 or more.
        size: long side of the images in pixels, 32 or more.
        normal_fraction: share of patients without a lesion, from 0 to below 1.
        masks: False to write no masks.
        labels: False to leave the labels empty.

    Raises:
        OSError: if the disk is full, the folder cannot be written, or it contains other files.
        ValueError: if a number is out of range.
    """
    check_drawing(seed, size, normal_fraction)
    if examples < 1:
        raise ValueError(f"examples: expected 1 or more, got {examples}")
    if _is_written(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp: its mode 0700 would be kept after the rename and lock out other users.
    unfinished = folder.parent / f".{folder.name}-{os.getpid()}-{secrets.token_hex(4)}"
    unfinished.mkdir()
    try:
        (unfinished / "images").mkdir()
        if masks:
            (unfinished / "masks").mkdir()
        rows: list[tuple[str, str, str, str]] = []
        for index in range(examples):
            example = draw_example(
                site, index, seed=seed, size=size, normal_fraction=normal_fraction
            )
            image_name = f"images/{index:04d}.png"
            mask_name = f"masks/{index:04d}.png" if masks else ""
            _write_png(unfinished / image_name, example.image)
            if masks:
                _write_png(unfinished / mask_name, example.mask)
            rows.append((image_name, mask_name, example.label if labels else "", example.group))
        # Written last, so that a folder left behind by a killed process is not mistaken for a site.
        with (unfinished / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not _is_written(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_phantoms(  # noqa: PLR0913 settings of one call, each used by name
    root: Path,
    *,
    sites: int,
    examples: int,
    seed: int,
    size: int = 128,
    normal_fraction: float = 0.0,
    without_masks: Collection[str] = (),
    without_labels: Collection[str] = (),
) -> None:
    """Write phantom sites to root/site-1, root/site-2 and so on.

    Args:
        root: parent folder, created if missing; existing sites are kept (see ``write_site``).
        sites: number of sites, 1 or more.
        examples: approximate number of examples per site; sites differ (``PhantomSite.volume``).
        seed: seed of the federation, which determines its scanners and patients; 0 or more.
        size: long side of the images in pixels, 32 or more.
        normal_fraction: share of patients without a lesion, from 0 to below 1.
        without_masks: names of sites without masks.
        without_labels: names of sites without labels.

    Raises:
        OSError: as in ``write_site``.
        ValueError: if a number is out of range or a name is unknown.
    """
    if sites < 1:
        raise ValueError(f"sites: expected 1 or more, got {sites}")
    if examples < 1:
        raise ValueError(f"examples: expected 1 or more, got {examples}")
    check_drawing(seed, size, normal_fraction)
    hospitals = [phantom_site(number, seed) for number in range(1, sites + 1)]
    names = [hospital.name for hospital in hospitals]
    for option, wanted in (("without_masks", without_masks), ("without_labels", without_labels)):
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ValueError(
                f"{option}: expected names among {', '.join(names)}, got {', '.join(unknown)}"
            )
    for hospital in hospitals:
        write_site(
            root / hospital.name,
            hospital,
            examples=max(1, round(examples * hospital.volume)),
            seed=seed,
            size=size,
            normal_fraction=normal_fraction,
            masks=hospital.name not in without_masks,
            labels=hospital.name not in without_labels,
        )


def _is_written(folder: Path) -> bool:
    return (folder / "labels.csv").is_file()


def _write_png(path: Path, image: NDArray[np.uint8]) -> None:
    # Not cv2.imwrite: it raises no error if the disk is full.
    encoded, data = cv2.imencode(".png", image)
    if not encoded:
        raise OSError(f"{path}: cannot encode an image of shape {image.shape} as PNG")
    path.write_bytes(data.tobytes())
