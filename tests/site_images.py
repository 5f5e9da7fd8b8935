"""Tiny sites with images of up to three objects, for all kinds of masks and labels.

An image is grey noise with up to three squares of different colours; its labels name the squares.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import write_manifest

THINGS = ("fluid", "scar", "cyst")
_CORNERS = ((2, 2), (2, 22), (22, 10))  # (top, left) of squares that do not touch
SIDE = 40


def shown_in(number: int) -> list[str]:
    """Return the objects in an image: every combination in turn, none first."""
    return [thing for k, thing in enumerate(THINGS) if number >> k & 1]


def planes_of(number: int) -> NDArray[np.uint8]:
    """Return the mask of each object, (SIDE, SIDE, 3) of 0 and 1."""
    planes = np.zeros((SIDE, SIDE, len(THINGS)), np.uint8)
    for k, thing in enumerate(THINGS):
        if thing in shown_in(number):
            top, left = _CORNERS[k]
            planes[top : top + 12, left : left + 12, k] = 1
    return planes


def image_of(number: int) -> NDArray[np.uint8]:
    """Return an image, (SIDE, SIDE, 3)."""
    noise = np.random.default_rng(number).integers(0, 60, (SIDE, SIDE, 3))
    return (noise + 180 * planes_of(number)).astype(np.uint8)


def write_exclusive_site(folder: Path, images: int) -> None:
    """Write a site with one index mask per image and one class: its last object, or fluid."""
    (folder / "masks").mkdir(parents=True)
    rows = []
    for number in range(images):
        index = (planes_of(number) * np.arange(1, 4, dtype=np.uint8)).max(axis=2)
        Image.fromarray(image_of(number)).save(folder / f"{number}.png")
        Image.fromarray(index).save(folder / f"masks/{number}.png")
        label = (shown_in(number) or ["fluid"])[-1]
        rows.append({"image": f"{number}.png", "mask": f"masks/{number}.png", "label": label})
    write_manifest(folder, rows)


def write_overlapping_site(folder: Path, images: int, annotated: tuple[str, ...] = THINGS) -> None:
    """Write a site with a mask per annotated object and labels of all objects in an image."""
    (folder / "masks").mkdir(parents=True)
    rows = []
    for number in range(images):
        Image.fromarray(image_of(number)).save(folder / f"{number}.png")
        row = {"image": f"{number}.png", "label": ";".join(shown_in(number)) or "none"}
        for thing in THINGS:
            row[f"mask-{thing}"] = ""
            if thing in annotated:
                row[f"mask-{thing}"] = f"masks/{number}-{thing}.png"
                plane = planes_of(number)[..., THINGS.index(thing)]
                Image.fromarray(255 * plane).save(folder / row[f"mask-{thing}"])
        rows.append(row)
    write_manifest(folder, rows)
