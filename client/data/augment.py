"""What a training image goes through before the network sees it: a flip, a turn, other light."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks the internet at import

import albumentations as A


class Augmentation:
    """Random changes of an image and its masks, the same for the same (seed, index).

    The published recipe's horizontal flip and rotation up to 25 degrees, with mild changes of
    scale, gain and contrast, as scanners differ. Vertical flips are left out: sound comes from
    above, and shadows fall below.

    Args:
        seed: of one pass over the data; another pass takes another.
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
        """Change one example.

        Shapes:
            image: (H, W, C); masks: (H, W, M)
        """
        self.pipeline.set_random_seed((self.seed + index) % 2**32)
        # each mask by itself: OpenCV rounds two channels otherwise than one or four, and classes
        # that exclude each other must go on doing so
        changed = self.pipeline(image=image, masks=list(np.moveaxis(masks, 2, 0)))
        return np.ascontiguousarray(changed["image"]), np.stack(changed["masks"], axis=2)
