"""Settings ``data`` and ``phantom``: the images, their classes and splits, and simulated sites."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from polyclinic.configs.schema.base import Names, Section, join_values

LabelKind = Literal["exclusive", "multi-label"]


LABEL_SEPARATOR = ";"  # separates the classes in a multi-label cell
NO_LABEL = "none"  # multi-label cell of an image that shows none of the classes


class DataConfig(Section):
    """The images' classes, size and preprocessing, and their split at every site."""

    root: str = Field(
        "",
        description="Folder of the simulated sites' images, one folder per site; empty: phantom "
        "images (settings phantom). Deployed sites use the data-root of their site.yaml.",
    )
    sites: Names = Field(
        (),
        description="Names of the simulated sites to use, separated by commas; empty: all.",
    )
    classes: Names = Field(
        ("benign", "malignant"),
        description="Names of the image classes in the order of the model's outputs, separated by "
        "commas.",
    )
    label_kind: LabelKind = Field(
        "exclusive",
        description="Kind of the image labels. exclusive: each image has one class; multi-label: "
        "an image has any number of classes, also none.",
    )
    positive: str = Field(
        "malignant",
        description="Positive class for sensitivity, specificity and AUC; one of data.classes.",
    )
    drop_labels: Names = Field(
        (),
        description="Images with one of these labels are left out, separated by commas; empty: "
        "keep all.",
    )
    mask_classes: Names = Field(
        ("lesion",),
        description="Names of the classes that masks outline, in the order of the model's outputs, "
        "separated by commas.",
    )
    mask_kind: Literal["exclusive", "overlapping"] = Field(
        "exclusive",
        description="Kind of the masks. exclusive: each pixel has at most one mask class; "
        "overlapping: a pixel can have several.",
    )
    image_height: int = Field(
        64, ge=32, le=2048, description="Height of the images after resizing, in pixels."
    )
    image_width: int = Field(
        64, ge=32, le=2048, description="Width of the images after resizing, in pixels."
    )
    channels: Literal[1, 3, 4] = Field(
        1, description="Colour channels of the images. 1: greyscale, 3: RGB, 4: RGBA."
    )
    resize: Literal["pad", "stretch"] = Field(
        "pad",
        description="Resizing method. pad: keep the aspect ratio and pad with black; stretch: "
        "change the aspect ratio.",
    )
    normalise: Literal["image", "fixed"] = Field(
        "image",
        description="Normalisation of pixel values. image: each image to mean 0 and standard "
        "deviation 1; fixed: (x / 255 - 0.5) / 0.25.",
    )
    val_fraction: float = Field(
        0.15,
        ge=0.0,
        lt=1.0,
        description="Share of each site's patients that is used for validation, which selects the "
        "best round; 0: none.",
    )
    test_fraction: float = Field(
        0.2,
        ge=0.0,
        lt=1.0,
        description="Share of each site's patients that is used for the final test; 0: none.",
    )
    split: Literal["stratified", "independent"] = Field(
        "stratified",
        description="Method that splits patients into training, validation and test. stratified: "
        "balanced by class; independent: each patient's split depends on no other patient, which "
        "privacy.mode dp-sgd requires.",
    )
    split_seed: int = Field(
        0,
        ge=0,
        description="Seed of the split into training, validation and test. Sites with a budget or "
        "a cohort ignore it and use a secret of their own.",
    )
    on_error: Literal["skip", "refuse"] = Field(
        "skip",
        description="Reaction to an image or mask that cannot be used. skip: leave it out and "
        "report it; refuse: the site refuses the run.",
    )

    @property
    def indexed_masks(self) -> bool:
        """Whether mask files hold one index per pixel: 0 background, k the k-th mask class."""
        return self.mask_kind == "exclusive" and len(self.mask_classes) > 1

    @property
    def mask_channels(self) -> int:
        """Number of maps of mask logits.

        There is one per mask class. With indexed masks, which are decoded with a softmax, a map of
        the background precedes them.
        """
        return len(self.mask_classes) + self.indexed_masks

    @model_validator(mode="after")
    def _named_classes(self) -> Self:
        least = 2 if self.label_kind == "exclusive" else 1
        if len(self.classes) < least:
            raise ValueError(
                f"data.classes: expected at least {'two names' if least == 2 else 'one name'}, "
                f"got {join_values(self.classes)!r}"
            )
        if not 1 <= len(self.mask_classes) <= 255:  # a mask file stores an index in one byte
            raise ValueError(
                f"data.mask-classes: expected 1 to 255 names, got {len(self.mask_classes)}"
            )
        for key, names in (("classes", self.classes), ("mask-classes", self.mask_classes)):
            if len(set(names)) != len(names):
                raise ValueError(f"data.{key}: expected distinct names, got {join_values(names)!r}")
        for name in self.classes:
            if self.label_kind == "multi-label" and (name == NO_LABEL or LABEL_SEPARATOR in name):
                raise ValueError(
                    f"data.classes: expected names without {LABEL_SEPARATOR!r} and not "
                    f"{NO_LABEL!r}, which have a meaning in multi-label cells, got {name!r}"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.positive not in self.classes:
            raise ValueError(
                f"data.positive: expected one of data.classes ({join_values(self.classes)}), "
                f"got {self.positive!r}"
            )
        both = set(self.drop_labels) & set(self.classes)
        if both:
            raise ValueError(
                f"data.drop-labels: {join_values(tuple(sorted(both)))} is also in data.classes"
            )
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                "data.val-fraction + data.test-fraction: expected a sum below 1, "
                f"got {self.val_fraction + self.test_fraction}"
            )
        return self


class PhantomConfig(Section):
    """Simulated sites with generated images, which are used when data.root is empty."""

    sites: int = Field(3, ge=1, le=100, description="Number of simulated sites.")
    examples: int = Field(
        120, ge=10, le=100_000, description="Number of images per site, on average."
    )
    size: int = Field(
        96, ge=32, le=1024, description="Length of the longer side of the images, in pixels."
    )
    seed: int = Field(0, ge=0, description="Seed from which the images are generated.")
    normal_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of images without a lesion; 0: all have one."
    )
    without_masks: Names = Field(
        (),
        description="Names of the sites without masks, separated by commas, as site-1,site-2; "
        "empty: all sites have masks.",
    )
    without_labels: Names = Field(
        (),
        description="Names of the sites without class labels, separated by commas, as site-1; "
        "empty: all sites have labels.",
    )
