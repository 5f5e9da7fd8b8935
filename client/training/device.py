"""Choose device, precision and compilation at a site."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn


class DeviceError(ValueError):
    """The site lacks the device or the compiler that the run requires."""


def find_device(name: str) -> torch.device:
    """Find a device by name.

    Args:
        name: a PyTorch device name; ``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        DeviceError: if there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = f"only {count} GPUs" if count else "no GPU"
        raise DeviceError(
            f"train.device: got {name!r}, but PyTorch sees {seen} on this machine; use auto or "
            "cpu, or check the driver and that PyTorch was installed with CUDA"
        )
    return device


def computes_bf16(device: torch.device) -> bool:
    """Whether a device supports bfloat16 in hardware; emulation is far slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    known = cpu.read_text(encoding="ascii", errors="replace").split() if cpu.is_file() else []
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(known)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """Return the data type of a precision; ``auto`` is bfloat16 on GPUs that support it."""
    wanted = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and computes_bf16(device)
    )
    return torch.bfloat16 if wanted else torch.float32


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return an autocast context for a precision; float32 needs none."""
    dtype = dtype_of(precision, device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compiled(model: nn.Module) -> nn.Module:
    """Compile a model with ``torch.compile``; the result shares the model's weights.

    The first batch takes a minute or more to compile, and so do the first batch of another size and
    the first batch of one example. The model must compile as one graph: at a graph break,
    recomputed batch norms could count a batch twice (``mtl_model.blocks.recomputed``).

    Raises:
        DeviceError: if there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise DeviceError(
            f"train.compile: expected a C++ compiler ({compiler}; $CXX names another), found none"
        )
    torch._dynamo.config.recompile_limit = 64  # networks per process
    fast = cast(nn.Module, torch.compile(model, fullgraph=True))
    fast.register_forward_pre_hook(_only_examples_vary)
    return fast


def _only_examples_vary(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Mark all dimensions but the batch as static, since dynamic image sides fail to compile.

    They would become dynamic if one process uses networks with several image sizes.
    """
    for dim in (1, 2, 3):
        torch._dynamo.mark_static(inputs[0], dim)
