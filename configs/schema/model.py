"""Settings ``model``: the architecture of the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from polyclinic.configs.schema.base import Counts, Section, Value, join_values

# Values of model.preset: for each name, the settings that differ from the defaults.
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
    """The architecture of the network (docs/model.md).

    The defaults are the published network with group norm instead of batch norm. A preset changes
    only settings that have their default value; other values given with the preset are kept.
    Flower passes every key, so this class cannot distinguish a default that a user wrote from one
    that was filled in. To combine a preset with the default of a setting that it changes, write out
    the preset's other settings instead of naming the preset. ``load_run_config`` sees what the user
    wrote and refuses the combination.
    """

    preset: Literal["full", "light"] = Field(
        "full",
        description="Preset of model settings. full: the defaults; light: backbone resnet18, "
        "stride 4, mlp-ratio 2 and dfe none, with a tenth of the operations. Settings with a value "
        "other than their default are kept.",
    )
    backbone: str = Field(
        "resnet34",
        pattern=r"^[a-z0-9_.]+$",
        description="Convolutional path of the encoder: the name of a timm model with feature maps "
        "at strides 4, 8, 16 and 32.",
    )
    pretrained: str = Field(
        "none",
        min_length=1,
        description="Initial weights of the convolutional path. none: random; timm: downloaded by "
        "timm; otherwise the path of a weights file on the coordinator.",
    )
    stride: Literal[2, 4] = Field(
        2,
        description="Stride of the first feature map: image side / map side. 4: the backbone's own "
        "stride; 2: half of it, with a stem of half the stride.",
    )
    width: int = Field(
        0,
        ge=0,
        multiple_of=16,
        description="Channels of the first stage of a ResNet backbone, a multiple of 16; 0: the "
        "backbone's own.",
    )
    depths: Counts = Field(
        (),
        description="Blocks in each of the 4 stages of a ResNet backbone, as 2,2,2,2; empty: the "
        "backbone's own.",
    )
    swin_depth: int = Field(
        2,
        ge=0,
        le=8,
        description="Swin transformer blocks per encoder stage, every second one with shifted "
        "windows; 0: none.",
    )
    head_channels: int = Field(
        32,
        ge=4,
        description="Minimum channels per attention head. Each stage has as many heads as this "
        "allows.",
    )
    window: int = Field(
        0,
        ge=0,
        description="Side of an attention window in tokens, at least 2; 0: the side of the deepest "
        "feature map.",
    )
    mlp_ratio: float = Field(
        4.0,
        ge=0.125,
        description="Hidden channels of a transformer block's MLP, divided by the block's "
        "channels.",
    )
    drop_path: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="Drop rate (stochastic depth) of the last transformer block. The rate rises "
        "linearly from 0 at the first block; 0: no drop.",
    )
    block_order: Literal["sequential", "parallel"] = Field(
        "sequential",
        description="Order within an encoder stage. sequential: the transformer blocks read the "
        "output of the convolutions; parallel: the outputs of both are added.",
    )
    token_mixing: Literal["proper", "published"] = Field(
        "proper",
        description="Layout in which the MLP's channel attention reads tokens. proper: channels "
        "stay channels; published: as in the authors' code, which mixes channels and tokens.",
    )
    norm: Literal["group", "batch"] = Field(
        "group",
        description="Normalisation layers. group: group norm, which needs no statistics across "
        "images; batch: batch norm, as published.",
    )
    dfe: Literal["concat", "sum", "none"] = Field(
        "concat",
        description="Dilated feature enhancement on the skip connections: branches with "
        "different dilations are concatenated (concat) or added (sum); none: no enhancement.",
    )
    dfe_rates: Counts = Field(
        (6, 12, 18),
        description="Dilations of the 3 branches of the dilated feature enhancement, in pixels of "
        "the feature map. Each is limited to the map's side - 1.",
    )
    upsample: Literal["transpose", "bilinear"] = Field(
        "transpose",
        description="Upsampling in the decoder. transpose: transposed convolution; bilinear: "
        "bilinear interpolation.",
    )
    head_stages: Counts = Field(
        (3, 4),
        description="Encoder stages, from 1 to 4, that the classification head reads, as 3,4.",
    )
    head_width: int = Field(
        32,
        ge=1,
        description="Width of the classification head's hidden layer.",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given  # a section that has been read before
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
