"""Random augmentation of training images: flip, rotation, scale, brightness and contrast."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no version check over the internet

import albumentations as A


class Augmentation:
    """Random changes of an image and its masks, reproducible for the same seed and index.

    Horizontal flip and rotation up to 25 degrees, as in the published recipe, plus mild changes of
    scale, brightness and contrast, because scanners differ. There are no vertical flips: in
    ultrasound, the probe is at the top and shadows point down.

    Args:
        seed: seed of one pass over the data; use a different one for each pass.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pipeline = A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.Affine(rotate=(-25, 25), scale=(0.9, 1.1), p=0.5),
                A.RandomBrightnessContrast(brightness_limit=0.15, contrast_limit=0.2, p=0.5),
            ]
        )

    def __call__(
        self, image: NDArray[np.uint8], masks: NDArray[np.uint8], index: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Augment one example.

        Args:
            image: the image.
            masks: its masks, transformed like the image.
            index: position of the example in its split.

        Shapes:
            image: (H, W, C)
            masks: (H, W, M)
        """
        self.pipeline.set_random_seed((self.seed + index) % 2**32)
        # Each mask is transformed separately: OpenCV rounds two channels differently from one or
        # four, and exclusive classes must not overlap afterwards.
        changed = self.pipeline(image=image, masks=list(np.moveaxis(masks, 2, 0)))
        return np.ascontiguousarray(changed["image"]), np.stack(changed["masks"], axis=2)
