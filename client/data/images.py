"""Decode, check and resize the image and masks of a manifest row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polyclinic.client.data.manifest import Row
from polyclinic.configs.schema.data import DataConfig

_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow mode by number of channels
_WITH_ALPHA = ("LA", "PA", "RGBA")


class Unusable(Exception):
    """A row's image or mask cannot be used. The message names the file and what is wrong."""


@dataclass(frozen=True)
class Pixels:
    """The resized image and masks of one example."""

    image: NDArray[np.uint8]  # (H, W, C)
    masks: NDArray[np.uint8]  # (H, W, M), 0 or 1; 0 if not annotated
    has_mask: NDArray[np.bool_]  # (M,), whether the mask class is annotated


@dataclass(frozen=True)
class Frame:
    """Size and position of a resized image within the network's input."""

    size: tuple[int, int]  # width and height of the resized image without padding
    inside: tuple[slice, slice]  # its rows and columns in the input

    @classmethod
    def of(cls, image: Image.Image, config: DataConfig) -> Frame:
        height, width = config.image_height, config.image_width
        size = (width, height)
        if config.resize == "pad":
            scale = min(height / image.height, width / image.width)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        top, left = (height - size[1]) // 2, (width - size[0]) // 2
        return cls(size, (slice(top, top + size[1]), slice(left, left + size[0])))


@dataclass(frozen=True)
class Picture:
    """An image without its annotations."""

    original: Image.Image  # decoded at full size, converted to the network's channels
    pixels: NDArray[np.uint8]  # (H, W, C), resized and padded to the network's input
    frame: Frame


def read_pixels(row: Row, config: DataConfig) -> Pixels:
    """Read a row's image and masks and resize them to the configured size.

    Raises:
        Unusable: if a file is missing or cannot be decoded, if a mask has another size than the
            image, or if a mask has a value without a class.
    """
    picture = read_picture(row.image, config)
    image, frame, pixels = picture.original, picture.frame, picture.pixels
    masks = np.zeros((*pixels.shape[:2], len(config.mask_classes)), np.uint8)
    has_mask = np.zeros(len(config.mask_classes), np.bool_)
    if config.indexed_masks:
        if row.mask is not None:
            mask = _of_size(_indices(row.mask, config.mask_classes), row.mask, image)
            indices = np.asarray(mask.resize(frame.size, Image.Resampling.NEAREST))
            masks[frame.inside] = indices[..., None] == np.arange(1, masks.shape[2] + 1)
            has_mask[:] = True
        return Pixels(pixels, masks, has_mask)
    for k, path in enumerate(_binary_masks(row, config)):
        if path is not None:
            mask = _of_size(_marked(path), path, image)
            marked = np.asarray(mask.resize(frame.size, Image.Resampling.BILINEAR)) > 127
            masks[(*frame.inside, k)] = marked
            has_mask[k] = True
    return Pixels(pixels, masks, has_mask)


def read_picture(path: Path, config: DataConfig) -> Picture:
    """Read an image without masks and resize it to the configured size.

    Raises:
        Unusable: if the file is missing or cannot be decoded.
    """
    image = _image(path, _MODES[config.channels])
    frame = Frame.of(image, config)
    pixels = np.zeros((config.image_height, config.image_width, config.channels), np.uint8)
    small = _resized(image, frame.size)
    pixels[frame.inside] = small.reshape(*small.shape[:2], config.channels)
    return Picture(image, pixels, frame)


def _binary_masks(row: Row, config: DataConfig) -> list[Path | None]:
    """List one file per mask class; None if the class is not annotated."""
    if config.mask_kind == "exclusive":
        return [row.mask]
    paths = dict(row.masks_of)
    return [paths.get(name) for name in config.mask_classes]


@contextlib.contextmanager
def _opened(kind: str, path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            file.load()
            yield file
    except FileNotFoundError:
        raise Unusable(f"{kind} {path}: no such file") from None
    except _UNREADABLE as error:
        raise Unusable(f"{kind} {path}: cannot be decoded ({error})") from None


def _image(path: Path, mode: str) -> Image.Image:
    """Decode an image; 16-bit greyscale keeps its upper 8 bits."""
    with _opened("image", path) as file:
        if file.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)).convert(mode)
        if file.mode in ("I", "F"):
            raise Unusable(
                f"image {path}: 32 bits per pixel: expected 8 or 16; convert it first, with a "
                "suitable intensity window"
            )
        return file.convert(mode)


def _marked(path: Path) -> Image.Image:
    """Decode a binary mask; the result is 255 where a channel other than alpha is not 0.

    Masks with values 0 and 1 and masks with values 0 and 255 are both common.
    """
    with _opened("mask", path) as file:
        mask = np.asarray(file.convert("RGB") if file.mode in ("P", *_WITH_ALPHA) else file) != 0
        return Image.fromarray(np.uint8(255) * (mask.any(axis=2) if mask.ndim == 3 else mask))


def _indices(path: Path, classes: Sequence[str]) -> Image.Image:
    """Decode a mask of class indices: palette indices, or grey values without alpha."""
    with _opened("mask", path) as file:
        values = np.asarray(file).astype(np.float64)
        if file.mode in _WITH_ALPHA:
            values = values[..., :-1]
        if values.ndim == 3:  # a greyscale mask may be saved as a colour image
            if (values != values[..., :1]).any():
                raise Unusable(f"mask {path}: expected one class index per pixel, got colours")
            values = values[..., 0]
        wrong = values[~np.isin(values, np.arange(len(classes) + 1))]
        if wrong.size:
            known = ", ".join(f"{k} {name}" for k, name in enumerate(("background", *classes)))
            raise Unusable(
                f"mask {path}: expected {known} (data.mask-classes), got {wrong.max():g}"
            )
        return Image.fromarray(values.astype(np.uint8))


def _of_size(mask: Image.Image, path: Path, image: Image.Image) -> Image.Image:
    if mask.size != image.size:
        raise Unusable(
            f"mask {path}: expected the image's size, {image.width} x {image.height}, "
            f"got {mask.width} x {mask.height}"
        )
    return mask


def _resized(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image bilinearly; (height, width) or (height, width, C)."""
    if image.mode != "RGBA":
        return np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    # per band, since Pillow would premultiply alpha, which is an ordinary channel here
    bands = [band.resize(size, Image.Resampling.BILINEAR) for band in image.split()]
    return np.stack([np.asarray(band) for band in bands], axis=2)
