"""Settings ``model``: the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from polyclinic.configs.schema.base import Counts, Section, Value, join_values

# What model.preset stands for: for every name, the settings in which it differs from the defaults.
MODEL_PRESETS: Mapping[str, Mapping[str, Value]] = {
    "full": {},
    "light": {
        "backbone": "resnet18",
        "stride": 4,
        "mlp-ratio": 2.0,
        "dfe": "none",
    },
}


class ModelConfig(Section):
    """The network's shape (docs/model.md). Defaults: the published one, but for group norm.

    A preset changes the settings that are at their defaults; others given beside it stay. (Flower
    hands over every key, so that a default that was written out cannot be told from one that was
    not: to have a default in place of a preset's value, name the settings instead of the preset.
    ``load_run_config``, which can tell, refuses it.)
    """

    preset: Literal["full", "light"] = Field(
        "full", description="light: a tenth of the operations; docs/model.md has what it sets."
    )
    backbone: str = Field(
        "resnet34", pattern=r"^[a-z0-9_.]+$", description="timm model that is the CNN path."
    )
    pretrained: str = Field(
        "none",
        min_length=1,
        description="CNN path's first weights: none, timm (downloads), or a file at the server.",
    )
    stride: Literal[2, 4] = Field(
        2, description="Image side over the first map's; 4: the backbone's own, 2: half its stem's."
    )
    width: int = Field(
        0, ge=0, multiple_of=16, description="Channels of a ResNet's first stage; 0: its own."
    )
    depths: Counts = Field((), description="Blocks of a ResNet's 4 stages; empty: its own.")
    swin_depth: int = Field(2, ge=0, le=8, description="Transformer blocks a stage.")
    head_channels: int = Field(32, ge=4, description="Least channels of one attention head.")
    window: int = Field(0, ge=0, description="Window side, tokens; 0: the deepest map's side.")
    mlp_ratio: float = Field(4.0, ge=0.125)
    drop_path: float = Field(0.1, ge=0.0, lt=1.0, description="Of the last block; 0 at the first.")
    block_order: Literal["sequential", "parallel"] = "sequential"
    token_mixing: Literal["proper", "published"] = Field(
        "proper", description="published: channels and tokens mixed up, as in the authors' code."
    )
    norm: Literal["group", "batch"] = "group"
    dfe: Literal["concat", "sum", "none"] = "concat"
    dfe_rates: Counts = Field((6, 12, 18), description="Dilations; cut to the map's side - 1.")
    upsample: Literal["transpose", "bilinear"] = "transpose"
    head_stages: Counts = Field((3, 4), description="Encoder stages that the classifier sees.")
    head_width: int = Field(32, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given  # a section that was already read
        settings = dict(given)
        for key, value in MODEL_PRESETS.get(str(given.get("preset", "full")), {}).items():
            name = key.replace("-", "_")
            default = cls.model_fields[name].default
            if all(settings.get(k, default) == default for k in (key, name)):
                settings.pop(name, None)
                settings[key] = value
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.depths and len(self.depths) != 4:
            raise ValueError(f"model.depths: expected 4 numbers, got {join_values(self.depths)!r}")
        if len(self.dfe_rates) != 3:
            raise ValueError(
                f"model.dfe-rates: expected 3 numbers, got {join_values(self.dfe_rates)!r}"
            )
        if not self.head_stages or not set(self.head_stages) <= {1, 2, 3, 4}:
            raise ValueError(
                "model.head-stages: expected stages from 1 to 4, got "
                f"{join_values(self.head_stages)!r}"
            )
        return self
