"""Weights as few flat arrays: one for each task group and dtype.

Flower moves every array of a message as an object of its own, so that a network of 300 tensors
pays 300 times. The layout (names, shapes, dtypes in order) follows from the network; its hash
travels along, and an end whose network differs is refused by name instead of being averaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyclinic.mtl_model.tasks import GROUPS, Group, group_of

Packed = dict[str, NDArray[Any]]

_LONGEST_HEADER = 1024  # bytes before the values of a .npy file; NumPy writes 128


@dataclass(frozen=True)
class LayoutEntry:
    """One tensor of a network's state."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        """The packed array that holds it."""
        return f"{group_of(self.name)}/{self.dtype}"

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def group_of_key(key: str) -> Group:
    """The task group of a packed array.

    Raises:
        ValueError: if there is no such group.
    """
    for group in GROUPS:
        if key.startswith(f"{group}/"):
            return group
    raise ValueError(f"{key}: expected an array of {', '.join(GROUPS)}")


@dataclass(frozen=True)
class Layout:
    """The order in which a network's state lies in its packed arrays."""

    entries: tuple[LayoutEntry, ...]

    @classmethod
    def of(cls, network: nn.Module) -> Layout:
        return cls(
            tuple(
                LayoutEntry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                for name, tensor in network.state_dict().items()
            )
        )

    def parts(self, apart: Set[str]) -> tuple[Layout, Layout]:
        """Two layouts: of all entries but those named, and of those, each in the same order."""
        return (
            Layout(tuple(e for e in self.entries if e.name not in apart)),
            Layout(tuple(e for e in self.entries if e.name in apart)),
        )

    @cached_property
    def digest(self) -> str:
        """sha256 over names, shapes and dtypes in order, as hexadecimal."""
        text = "\n".join(f"{e.name} {e.shape} {e.dtype}" for e in self.entries)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def by_key(self) -> dict[str, tuple[LayoutEntry, ...]]:
        """Entries of each packed array, keys in a fixed order."""
        keys = sorted({entry.key for entry in self.entries})
        return {key: tuple(e for e in self.entries if e.key == key) for key in keys}

    def pack(self, state: Mapping[str, Tensor]) -> Packed:
        """Copy a state dict into flat arrays."""
        return {
            key: np.concatenate([state[e.name].detach().cpu().numpy().ravel() for e in entries])
            for key, entries in self.by_key.items()
        }

    def read(self, serialised: Mapping[str, bytes]) -> Packed:
        """Read arrays that arrived as NumPy's files (``.npy``), and compare them with this layout.

        Nothing that is larger than it may be is read, and whatever is wrong with the bytes is one
        kind of error: they come from somebody else.

        Raises:
            ValueError: as ``unpack``.
        """
        self._only_known(serialised)
        packed: Packed = {}
        for key, entries in self.by_key.items():
            size, dtype = sum(e.size for e in entries), np.dtype(entries[0].dtype)
            content = serialised.get(key)
            if content is None:
                continue  # which ``check`` tells
            if len(content) > size * dtype.itemsize + _LONGEST_HEADER:
                raise ValueError(
                    f"{key}: expected {size} values of {dtype}, got {len(content)} bytes"
                )
            try:
                # NEVER allow pickles: they run as code
                packed[key] = np.lib.format.read_array(BytesIO(content), allow_pickle=False)
            except Exception as error:  # noqa: BLE001 - NumPy raises a dozen kinds
                raise ValueError(f"{key}: expected an array in NumPy's format, {error}") from None
        self.check(packed)
        return packed

    def _only_known(self, keys: Iterable[str]) -> None:
        extra = sorted(set(keys) - set(self.by_key))
        if extra:
            raise ValueError(f"{extra[0]}: expected only {', '.join(self.by_key) or 'no arrays'}")

    def unpack(self, packed: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Cut flat arrays into a state dict.

        Raises:
            ValueError: naming the array that is missing, unknown, of another dtype or length, or
                not finite.
        """
        self.check(packed)
        state: dict[str, Tensor] = {}
        for key, entries in self.by_key.items():
            start = 0
            for entry in entries:
                part = packed[key][start : start + entry.size]
                state[entry.name] = torch.from_numpy(part.copy()).view(entry.shape)
                start += entry.size
        return state

    def check(self, packed: Mapping[str, NDArray[Any]]) -> None:
        """Compare arrays that arrived with this layout.

        Raises:
            ValueError: as ``unpack``.
        """
        self._only_known(packed)
        for key, entries in self.by_key.items():
            size, dtype = sum(e.size for e in entries), entries[0].dtype
            if key not in packed:
                raise ValueError(f"{key}: expected {size} values of {dtype}, got nothing")
            array = packed[key]
            if array.shape != (size,) or array.dtype != np.dtype(dtype):
                raise ValueError(
                    f"{key}: expected {size} values of {dtype}, "
                    f"got shape {array.shape} of {array.dtype}"
                )
            if not np.isfinite(array).all():
                bad = int((~np.isfinite(array)).sum())
                raise ValueError(f"{key}: expected finite values, got {bad} of {size} not finite")
