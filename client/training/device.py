"""Where and how precisely a site computes."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn


class DeviceError(ValueError):
    """The device that the run asks for is not at this site."""


def find_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        DeviceError: if a GPU is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"train.device: expected one of {torch.cuda.device_count()} GPUs or cpu, got {name!r}"
        )
    return device


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without, it is emulated and far slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    known = cpu.read_text(encoding="ascii", errors="replace").split() if cpu.is_file() else []
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(known)


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 where asked for; ``auto`` asks for it on a GPU that has it."""
    wanted = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and computes_bf16(device)
    )
    return torch.bfloat16 if wanted else torch.float32


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Let layers that bear it compute in the precision's type."""
    dtype = dtype_of(precision, device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compiled(model: nn.Module) -> nn.Module:
    """A faster form of a model that shares its weights.

    The first batch compiles for a minute or more, and so do the first of another number of
    examples and of one alone. As one graph: where PyTorch would cut it in two, recomputed batch
    norms could count a batch twice (``mtl_model.blocks.recomputed``).

    Raises:
        DeviceError: if there is no compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise DeviceError(
            f"train.compile: expected a C++ compiler ({compiler}; $CXX names another), found none"
        )
    torch._dynamo.config.recompile_limit = 64  # networks that one process may come to
    fast = cast(nn.Module, torch.compile(model, fullgraph=True))
    fast.register_forward_pre_hook(_only_examples_vary)
    return fast


def _only_examples_vary(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Sides that vary too, as where one process has networks of several, compile to what fails."""
    for dim in (1, 2, 3):
        torch._dynamo.mark_static(inputs[0], dim)
