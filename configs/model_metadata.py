"""Metadata of model files, which is enough to use a model without the run that trained it.

Checkpoints and safetensors, ONNX and TorchScript files have the same text entries in their
metadata; docs/export.md lists them. Polyclinic reads only ``config``. The entries ``input``,
``preprocessing`` and ``outputs`` give the same information to people and other programs.
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

SCHEMA_VERSION = "1"  # version of these entries; readers refuse unknown versions
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

# Sections that define a model. The others describe its training, except for one setting.
_SECTIONS = ("model", "data", "loss")
_PERSONAL = "strategy.personal"  # says whether parts of the model stayed at the sites
# Settings in these sections that a trained model does not need. All other keys are kept, so that
# settings unknown to this version are not lost silently.
_NOT_NEEDED = {
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
    """A file cannot be used as a model. The message gives the reason."""


@dataclass(frozen=True)
class ModelMetadata:
    """Origin of a model and the settings that are needed to use it."""

    config: RunConfig  # settings that a trained model needs; all others have their defaults
    round: int  # round of the run that the weights are from
    layout: str  # digest of the names and shapes of the network's state (mtl_model/packing.py)
    run: str = ""  # name of the run; empty in the run's own checkpoints
    weights_sha256: str = ""  # digest of the exported checkpoint; empty in checkpoints
    version: str = VERSION  # version of polyclinic that wrote the file

    @property
    def data(self) -> DataConfig:
        """Settings of the images and their classes."""
        return self.config.data

    def to_metadata(self) -> dict[str, str]:
        """Return the text entries for a file's metadata, with the keys in ``KEYS``."""
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
        """Read the metadata of an exported file or of a checkpoint.

        Args:
            metadata: text entries, as ``to_metadata`` returns them.
            network: whether the network will be built from the settings. Files with a graph (ONNX,
                TorchScript) need only the settings of images and outputs.

        Raises:
            ModelFileError: if an entry is missing or unknown to this version, or if parts of the
                model stayed at the sites that trained it.
        """
        version = metadata.get("polyclinic-version", "an earlier version")
        try:
            edition = metadata.get("passport", SCHEMA_VERSION)
            if edition != SCHEMA_VERSION:
                raise ValueError(f"passport: expected version {SCHEMA_VERSION}, got {edition!r}")
            flat = json.loads(metadata["config"])
            if not isinstance(flat, dict):
                raise ValueError(f"config: expected a table, got {flat!r}")
            kept = _needed(flat)
            apart = kept.get(_PERSONAL, "none")
            if apart != "none":
                raise ModelFileError(
                    f"its {apart} stayed at the sites ({_PERSONAL}), and this file has only their "
                    "initial values: use the model with the layers of a site"
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
                f"expected a model file of Polyclinic, its metadata has no entry {error}"
            ) from None
        except ModelFileError:
            raise
        except (ConfigError, ValueError) as error:
            raise ModelFileError(
                f"written by polyclinic {version}, not compatible with {VERSION}: {error}"
            ) from None


def _needed(flat: Flat) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat.items()
        if key == _PERSONAL or (key.partition(".")[0] in _SECTIONS and key not in _NOT_NEEDED)
    }


def _input(data: DataConfig) -> dict[str, Any]:
    return {
        "name": "images",
        "type": "float32",
        "shape": ["batch", data.channels, "height", "width"],
        "trained-at": [data.image_height, data.image_width],
    }


def preprocessing(data: DataConfig) -> dict[str, Any]:
    """Describe how an image becomes the network's input, for people and other programs."""
    colours = {1: "grey", 3: "red, green, blue", 4: "red, green, blue, alpha"}[data.channels]
    size = f"{data.image_height} rows by {data.image_width} columns"
    return {
        "height": data.image_height,
        "width": data.image_width,
        "channels": data.channels,
        "resize": data.resize,
        "normalise": data.normalise,
        "steps": [
            f"decode to 8 bits per channel: {colours}; use the upper 8 bits of 16-bit greyscale",
            {
                "pad": f"scale to fit into {size} and keep the aspect ratio, bilinear with "
                "antialiasing (Pillow's BILINEAR); centre the image on black, with an odd row or "
                "column of padding at the bottom or right",
                "stretch": f"scale to {size}, bilinear with antialiasing (Pillow's BILINEAR)",
            }[data.resize],
            {
                "image": "x = (x - mean) / (deviation + 1), with the mean and the population "
                "standard deviation over all pixels and channels of the resized image (0 to 255, "
                "including black padding)",
                "fixed": "x = (x / 255 - 0.5) / 0.25",
            }[data.normalise],
            "order the axes: batch, channel, row, column",
        ],
    }


def outputs(data: DataConfig) -> dict[str, Any]:
    """Describe the two outputs and how to interpret them."""
    softmax = {"activation": "softmax over the channels", "decide": "the largest"}
    sigmoid = {"activation": "sigmoid per channel", "decide": "logit above 0"}
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
