"""Serialise a network to the bytes of a file, in each export format."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from polyclinic.configs.model_metadata import ModelFileError, ModelMetadata
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.portable import portable_form
from polyclinic.mtl_model.saved import Format, torchscript_deprecated

if TYPE_CHECKING:  # onnx is an optional dependency, imported only when it is used
    import onnx

OUTPUTS = ("mask_logits", "class_logits")
OPSET = 20  # the first version with Gelu as one operator
ONNX_LIMIT = 2**31  # bytes; a larger model would need a separate file of weights


def _safetensors(network: MultiTaskUNet, metadata: ModelMetadata) -> bytes:
    return save(network.state_dict(), metadata.to_metadata())


def _example(metadata: ModelMetadata) -> Tensor:
    """Return an input for tracing, (2, C, H, W).

    No dimension is 1 or the size used in training, because exporters would treat such dimensions as
    constants.
    """
    data = metadata.data
    return torch.zeros(2, data.channels, data.image_height + 16, data.image_width + 8)


def _torchscript(network: MultiTaskUNet, metadata: ModelMetadata) -> bytes:
    portable = portable_form(network)
    buffer = io.BytesIO()
    with torchscript_deprecated():
        # Group norm checks that it has more than one value per group, which does not depend on the
        # traced size.
        warnings.filterwarnings(
            "ignore",
            "Converting a tensor to a Python boolean",
            Warning,
            r"torch\.nn\.functional",
        )
        # The tracer's own check is off, because export.py compares the outputs at several sizes.
        traced = torch.jit.trace(portable, _example(metadata), check_trace=False)
        torch.jit.save(traced, buffer, _extra_files=metadata.to_metadata())
    return _without_source_lines(buffer.getvalue())


def _without_source_lines(archive: bytes) -> bytes:
    """Remove the debug information, which names source files on this machine."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if not name.endswith(".debug_pkl"):
                # ZipInfo's default date makes the bytes of a model reproducible
                new.writestr(zipfile.ZipInfo(name), old.read(name))
    return out.getvalue()


def _onnx(network: MultiTaskUNet, metadata: ModelMetadata) -> bytes:
    import onnx
    from torch.export import Dim

    axes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.onnx.export(
        portable_form(network),
        (_example(metadata),),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=(axes,),
        input_names=["images"],
        output_names=list(OUTPUTS),
        external_data=False,
        verbose=False,
    )
    assert program is not None  # None is possible only with dynamo=False
    model = program.model_proto
    _name_axes(model.graph.input[0], {0: "batch", 2: "height", 3: "width"})
    _name_axes(model.graph.output[0], {0: "batch", 2: "height", 3: "width"})
    _name_axes(model.graph.output[1], {0: "batch"})
    _drop_source_lines(model.graph)
    model.doc_string = "Polyclinic: segmentation and image class. See metadata_props."
    onnx.helper.set_model_props(model, metadata.to_metadata())
    if model.ByteSize() >= ONNX_LIMIT:
        raise ModelFileError("onnx: expected less than 2 GiB of weights; use safetensors")
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _name_axes(value: onnx.ValueInfoProto, names: Mapping[int, str]) -> None:
    for axis, name in names.items():
        value.type.tensor_type.shape.dim[axis].dim_param = name


def _drop_source_lines(graph: onnx.GraphProto) -> None:
    """Remove names of source files on this machine, and shapes of values that no longer exist."""
    del graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output):
        del part.metadata_props[:]


WRITERS: dict[Format, Callable[[MultiTaskUNet, ModelMetadata], bytes]] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torchscript": _torchscript,
}
