"""Load saved models in safetensors, ONNX or TorchScript format behind one interface.

A safetensors file contains only numbers and is never executed. ONNX and TorchScript files contain
a graph or program, which is executed: open such files only from trusted sources.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyclinic.configs.model_metadata import KEYS, ModelFileError, ModelMetadata
from polyclinic.mtl_model.backbone import BackboneError
from polyclinic.mtl_model.network import MultiTaskUNet, network_of
from polyclinic.mtl_model.packing import Layout

Format = Literal["safetensors", "onnx", "torchscript"]
SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".onnx": "onnx",
    ".pt": "torchscript",
}

# Maps images (B, C, H, W) float32, normalised, to mask logits (B, M, H, W) or (B, M + 1, H, W), and
# class logits (B, K).
Logits = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SavedModel:
    """A model that was loaded from a file and is ready for inference."""

    metadata: ModelMetadata
    sha256: str  # hexadecimal digest of the file
    logits: Logits

    @property
    def weights_sha256(self) -> str:
        """Digest of the checkpoint; the same for every file that was exported from it."""
        return self.metadata.weights_sha256 or self.sha256


def format_of(path: Path, named: str | None = None) -> Format:
    """Determine the format of a file from its suffix.

    Args:
        path: the file, which need not exist.
        named: the requested format, which must agree with the suffix; None for any format.

    Raises:
        ModelFileError: if the format is unknown, or the suffix does not match it.
    """
    if named is not None and named not in SUFFIXES.values():
        known = ", ".join(SUFFIXES.values())
        raise ModelFileError(f"--format: expected one of {known}, got {named!r}")
    wanted = [suffix for suffix, kind in SUFFIXES.items() if named in (None, kind)]
    if path.suffix not in wanted:
        raise ModelFileError(f"{path}: expected a file ending in {', '.join(wanted)}")
    return SUFFIXES[path.suffix]


def open_model(path: Path) -> SavedModel:
    """Load a model file of any supported format on the CPU.

    Raises:
        ModelFileError: if the file is not a Polyclinic model, cannot be used by this version, or
            is an ONNX file and ONNX Runtime is not installed. The message names the file.
    """
    opened = _OPENERS[format_of(path)]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    metadata, logits = opened(path)
    return SavedModel(metadata, digest, logits)


def open_network(path: Path) -> tuple[ModelMetadata, MultiTaskUNet]:
    """Build the network of a safetensors file and load its weights, in evaluation mode.

    Raises:
        ModelFileError: if the file is not a Polyclinic model, or this version builds a different
            network from its settings. The message names the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
    except SafetensorError as error:
        raise ModelFileError(f"{path}: expected a safetensors file, {error}") from None
    metadata = _metadata_of(path, entries, network=True)
    config = metadata.config
    try:
        network = network_of(config.model, config.data, config.loss, seed=0)
    except BackboneError as error:
        raise ModelFileError(f"{path}: its network cannot be built here: {error}") from None
    built = Layout.of(network).digest
    if built != metadata.layout:
        raise ModelFileError(
            f"{path}: written by polyclinic {metadata.version}, which builds a different network "
            f"from these settings: expected layout {built[:12]}, got {metadata.layout[:12]}; open "
            "the file with the version that wrote it"
        )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ModelFileError(
            f"{path}: expected weights that match the network of its settings, {error}"
        ) from None
    return metadata, network.eval()


def _metadata_of(path: Path, entries: dict[str, str], *, network: bool) -> ModelMetadata:
    try:
        return ModelMetadata.from_metadata(entries, network=network)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None


def _open_safetensors(path: Path) -> tuple[ModelMetadata, Logits]:
    metadata, network = open_network(path)

    @torch.inference_mode()
    def logits(images: Tensor) -> tuple[Tensor, Tensor]:
        prediction = network(images)
        return prediction.mask_logits, prediction.class_logits

    return metadata, logits


def check_onnx(*packages: str) -> None:
    """Check that packages for ONNX are installed, without importing them.

    Raises:
        ModelFileError: if one is missing. The message names it and what to install.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelFileError(
            f"ONNX files: missing packages {', '.join(missing)}; pip install 'polyclinic[export]'"
        )


def _open_onnx(path: Path) -> tuple[ModelMetadata, Logits]:
    check_onnx("onnxruntime")
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
    ) as error:
        raise ModelFileError(f"{path}: expected an ONNX file, {error}") from None
    entries = dict(session.get_modelmeta().custom_metadata_map)
    metadata = _metadata_of(path, entries, network=False)

    def logits(images: Tensor) -> tuple[Tensor, Tensor]:
        values = np.ascontiguousarray(images.numpy())
        masks, classes = session.run(["mask_logits", "class_logits"], {"images": values})
        return torch.from_numpy(masks), torch.from_numpy(classes)

    return metadata, logits


def _open_torchscript(path: Path) -> tuple[ModelMetadata, Logits]:
    entries: dict[str, str | bytes] = dict.fromkeys(KEYS, "")
    try:
        with torchscript_deprecated():
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=entries)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelFileError(f"{path}: expected a TorchScript file, {first}") from None
    found = {key: v.decode() if isinstance(v, bytes) else v for key, v in entries.items()}
    metadata = _metadata_of(path, {k: text for k, text in found.items() if text}, network=False)

    @torch.inference_mode()
    def logits(images: Tensor) -> tuple[Tensor, Tensor]:
        masks, classes = module(images)
        return masks, classes

    return metadata, logits


@contextmanager
def torchscript_deprecated() -> Iterator[None]:
    """Suppress PyTorch's deprecation warnings about TorchScript.

    The format is offered for programs without Python that support no other format; users of this
    package cannot act on the warnings.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


_OPENERS: dict[Format, Callable[[Path], tuple[ModelMetadata, Logits]]] = {
    "safetensors": _open_safetensors,
    "onnx": _open_onnx,
    "torchscript": _open_torchscript,
}
