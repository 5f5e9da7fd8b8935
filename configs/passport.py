"""What a model's file says of the model: enough to use it without the run that made it.

The same text entries stand in a checkpoint's, a safetensors file's, an ONNX file's and a
TorchScript file's metadata; docs/export.md lists them. Ours are read from ``config`` alone;
``input``, ``preprocessing`` and ``outputs`` say the same to people and to other programs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyclinic.configs import VERSION
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.base import Flat
from polyclinic.configs.schema.data import DataConfig

SCHEMA_VERSION = "1"  # of these entries; a reader refuses one that it does not know
KEYS = (
    "passport",
    "polyclinic-version",
    "run",
    "round",
    "weights-sha256",
    "layout",
    "config",
    "input",
    "preprocessing",
    "outputs",
)

# Sections that say what a model is; the others say how it came about, but for one setting.
_SECTIONS = ("model", "data", "loss")
_PERSONAL = "strategy.personal"  # whether parts of it stayed elsewhere
# Of those sections, what a finished model does not need. A key that is not named here is kept:
# a setting that this version does not know must not be lost without a word.
_OF_THE_RUN = {
    "data.root",
    "data.sites",
    "data.drop-labels",
    "data.val-fraction",
    "data.test-fraction",
    "data.split-seed",
    "data.on-error",
    "model.pretrained",
    "loss.segmentation",
    "loss.focal-gamma",
    "loss.label-smoothing",
    "loss.class-weights",
}


class ModelFileError(ValueError):
    """A file cannot be used as a model. The message says why."""


@dataclass(frozen=True)
class ModelMetadata:
    """Where a model comes from, and how to use it."""

    config: RunConfig  # the settings that a finished model needs; all others are defaults
    round: int
    layout: str  # digest of the network's state (mtl_model/packing.py)
    run: str = ""  # name of the run; empty in the run's own checkpoints
    weights_sha256: str = ""  # of the checkpoint that was exported; empty as above
    version: str = VERSION  # of polyclinic, when the file was written

    @property
    def data(self) -> DataConfig:
        return self.config.data

    def to_metadata(self) -> dict[str, str]:
        """Text entries for a file's metadata, those of ``KEYS``."""
        data = self.data
        return {
            "passport": SCHEMA_VERSION,
            "polyclinic-version": self.version,
            "run": self.run,
            "round": str(self.round),
            "weights-sha256": self.weights_sha256,
            "layout": self.layout,
            "config": json.dumps(_needed(self.config.to_flat())),
            "input": json.dumps(_input(data)),
            "preprocessing": json.dumps(preprocessing(data)),
            "outputs": json.dumps(outputs(data)),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, network: bool) -> ModelMetadata:
        """Read what ``to_metadata`` wrote, or a checkpoint's metadata.

        Args:
            network: whether the network is to be built from the settings; a file that holds a
                graph of its own is used by what is said of images and outputs alone.

        Raises:
            ModelFileError: if an entry is missing or says what this version does not know, or if
                parts of the model stayed at the sites that trained it.
        """
        version = metadata.get("polyclinic-version", "an earlier version")
        try:
            edition = metadata.get("passport", SCHEMA_VERSION)
            if edition != SCHEMA_VERSION:
                raise ValueError(f"passport: expected edition {SCHEMA_VERSION}, got {edition!r}")
            flat = json.loads(metadata["config"])
            if not isinstance(flat, dict):
                raise ValueError(f"config: expected a table, got {flat!r}")
            kept = _needed(flat)
            apart = kept.get(_PERSONAL, "none")
            if apart != "none":
                raise ModelFileError(
                    f"its {apart} stayed at the sites ({_PERSONAL}), and are here as they were "
                    "initialised: without a site's own it is no model"
                )
            if not network:
                kept = {k: v for k, v in kept.items() if not k.startswith("model.")}
            return cls(
                RunConfig.from_flat(kept),
                int(metadata["round"]),
                metadata["layout"],
                metadata.get("run", ""),
                metadata.get("weights-sha256", ""),
                version,
            )
        except KeyError as error:
            raise ModelFileError(
                f"expected metadata that Polyclinic writes, found no entry {error}"
            ) from None
        except ModelFileError:
            raise
        except (ConfigError, ValueError) as error:
            raise ModelFileError(
                f"written by polyclinic {version}, does not fit {VERSION}: {error}"
            ) from None


def _needed(flat: Flat) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if key == _PERSONAL or (key.partition(".")[0] in _SECTIONS and key not in _OF_THE_RUN)
    }


def _input(data: DataConfig) -> dict[str, Any]:
    return {
        "name": "images",
        "type": "float32",
        "shape": ["batch", data.channels, "height", "width"],
        "trained-at": [data.image_height, data.image_width],
    }


def preprocessing(data: DataConfig) -> dict[str, Any]:
    """How a picture becomes the network's input, in order, for people and other programs."""
    colours = {1: "grey", 3: "red, green, blue", 4: "red, green, blue, alpha"}[data.channels]
    size = f"{data.image_height} rows by {data.image_width} columns"
    return {
        "height": data.image_height,
        "width": data.image_width,
        "channels": data.channels,
        "resize": data.resize,
        "normalise": data.normalise,
        "steps": [
            f"decode to 8 bits a channel: {colours}; of 16-bit greys, the upper 8 bits",
            {
                "pad": f"scale by the largest factor that fits {size}, the aspect ratio kept, "
                "bilinear with antialiasing (Pillow's BILINEAR); centre it on black, the odd row "
                "or column below or to the right",
                "stretch": f"scale to {size}, bilinear with antialiasing (Pillow's BILINEAR)",
            }[data.resize],
            {
                "image": "x = (x - mean) / (deviation + 1), both over all pixels and channels of "
                "the image as it is by now (0 to 255, black included); population deviation",
                "fixed": "x = (x / 255 - 0.5) / 0.25",
            }[data.normalise],
            "order the axes: batch, channel, row, column",
        ],
    }


def outputs(data: DataConfig) -> dict[str, Any]:
    """What the two outputs are, and how they are read."""
    softmax = {"activation": "softmax over the channels", "decide": "the largest"}
    sigmoid = {"activation": "sigmoid, each channel by itself", "decide": "logit above 0"}
    names = list(data.mask_classes)
    return {
        "mask_logits": {
            "shape": ["batch", data.mask_channels, "height", "width"],
            "channels": ["background", *names] if data.indexed_masks else names,
            **(softmax if data.indexed_masks else sigmoid),
        },
        "class_logits": {
            "shape": ["batch", len(data.classes)],
            "channels": list(data.classes),
            **(sigmoid if data.label_kind == "multi-label" else softmax),
        },
    }
