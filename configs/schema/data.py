"""Settings ``data`` and ``phantom``: what images are and how they are split."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from polyclinic.configs.schema.base import Names, Section, join_values

LabelKind = Literal["exclusive", "multi-label"]


LABEL_SEPARATOR = ";"  # between the classes of a multi-label cell


NO_LABEL = "none"  # such a cell of an image that is known to have none of them


class DataConfig(Section):
    """What the images are and how every site reads and splits them."""

    root: str = Field("", description="Simulated sites' data; empty: phantom hospitals.")
    sites: Names = Field((), description="Only these sites; empty: all.")
    classes: Names = Field(("benign", "malignant"), description="Image classes, in order.")
    label_kind: LabelKind = Field(
        "exclusive", description="exclusive: an image has one class; multi-label: any of them."
    )
    positive: str = Field("malignant", description="Class that sensitivity and AUC refer to.")
    drop_labels: Names = Field((), description="Labels whose rows are left out.")
    mask_classes: Names = Field(("lesion",), description="What masks outline, in order.")
    mask_kind: Literal["exclusive", "overlapping"] = Field(
        "exclusive", description="exclusive: a pixel has one class at most; overlapping: any."
    )
    image_height: int = Field(64, ge=32, le=2048, description="Pixels after resizing.")
    image_width: int = Field(64, ge=32, le=2048, description="Pixels after resizing.")
    channels: Literal[1, 3, 4] = Field(1, description="Grey, RGB or RGBA.")
    resize: Literal["pad", "stretch"] = Field("pad", description="pad keeps the aspect ratio.")
    normalise: Literal["image", "fixed"] = Field(
        "image", description="image: each image to mean 0, deviation 1; fixed: (x/255-0.5)/0.25."
    )
    val_fraction: float = Field(0.15, ge=0.0, lt=1.0)
    test_fraction: float = Field(0.2, ge=0.0, lt=1.0)
    split: Literal["stratified", "independent"] = Field(
        "stratified",
        description="independent: no patient's split depends on others, as dp-sgd needs.",
    )
    split_seed: int = Field(0, ge=0)
    on_error: Literal["skip", "refuse"] = Field(
        "skip", description="What an image that cannot be read does to its site."
    )

    @property
    def indexed_masks(self) -> bool:
        """Whether a mask file holds an index a pixel: 0 background, k the k-th mask class."""
        return self.mask_kind == "exclusive" and len(self.mask_classes) > 1

    @property
    def mask_channels(self) -> int:
        """Maps of mask logits: one a class, and one of background before them where a softmax
        tells the classes apart."""
        return len(self.mask_classes) + self.indexed_masks

    @model_validator(mode="after")
    def _named_classes(self) -> Self:
        least = 2 if self.label_kind == "exclusive" else 1
        if len(self.classes) < least:
            raise ValueError(
                f"data.classes: expected at least {'two names' if least == 2 else 'one name'}, "
                f"got {join_values(self.classes)!r}"
            )
        if not 1 <= len(self.mask_classes) <= 255:  # an index is a byte
            raise ValueError(
                f"data.mask-classes: expected 1 to 255 names, got {len(self.mask_classes)}"
            )
        for key, names in (("classes", self.classes), ("mask-classes", self.mask_classes)):
            if len(set(names)) != len(names):
                raise ValueError(f"data.{key}: expected distinct names, got {join_values(names)!r}")
        for name in self.classes:
            if self.label_kind == "multi-label" and (name == NO_LABEL or LABEL_SEPARATOR in name):
                raise ValueError(
                    f"data.classes: expected names without {LABEL_SEPARATOR!r} and none called "
                    f"{NO_LABEL!r}, which multi-label cells are written with, got {name!r}"
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
    """The simulated hospitals that stand in when data.root is empty."""

    sites: int = Field(3, ge=1, le=100)
    examples: int = Field(120, ge=10, le=100_000, description="Images a site, on average.")
    size: int = Field(96, ge=32, le=1024, description="Long side of the images, pixels.")
    seed: int = Field(0, ge=0)
    normal_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="Share without a lesion.")
    without_masks: Names = Field((), description="Sites that have no masks (site-1,...).")
    without_labels: Names = Field((), description="Sites that have no labels.")
