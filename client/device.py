"""Where and how precisely a site computes."""

from __future__ import annotations

import contextlib

import torch


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


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 where asked for; ``auto`` asks for it on a GPU that has it."""
    wanted = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last is what a GPU's tensor cores read."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format
