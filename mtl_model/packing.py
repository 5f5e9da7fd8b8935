"""Weights packed into flat arrays, one per task group and dtype.

Flower transfers every array of a message as a separate object, with an overhead that a network of
300 tensors would pay 300 times. The layout (names, shapes and dtypes in order) follows from the
network. Its hash is sent along, so that weights of a different network are rejected instead of
averaged.
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
    """One tensor of a network's state dict."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # without "torch.", for example "float32"

    @property
    def key(self) -> str:
        """Key of the packed array that contains the tensor."""
        return f"{group_of(self.name)}/{self.dtype}"

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))


def group_of_key(key: str) -> Group:
    """Return the task group of a packed array.

    Raises:
        ValueError: if the key does not start with a known group.
    """
    for group in GROUPS:
        if key.startswith(f"{group}/"):
            return group
    raise ValueError(f"{key}: expected an array of {', '.join(GROUPS)}")


@dataclass(frozen=True)
class Layout:
    """The order of a network's tensors in its packed arrays."""

    entries: tuple[LayoutEntry, ...]

    @classmethod
    def of(cls, network: nn.Module) -> Layout:
        """Return the layout of a network's state dict."""
        return cls(
            tuple(
                LayoutEntry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
                for name, tensor in network.state_dict().items()
            )
        )

    def parts(self, apart: Set[str]) -> tuple[Layout, Layout]:
        """Split into a layout without the named entries and one with only them, order kept."""
        return (
            Layout(tuple(e for e in self.entries if e.name not in apart)),
            Layout(tuple(e for e in self.entries if e.name in apart)),
        )

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of names, shapes and dtypes in order."""
        text = "\n".join(f"{e.name} {e.shape} {e.dtype}" for e in self.entries)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def by_key(self) -> dict[str, tuple[LayoutEntry, ...]]:
        """Entries of each packed array, with keys in sorted order."""
        keys = sorted({entry.key for entry in self.entries})
        return {key: tuple(e for e in self.entries if e.key == key) for key in keys}

    def pack(self, state: Mapping[str, Tensor]) -> Packed:
        """Copy a state dict into flat arrays, one 1-D array per key."""
        return {
            key: np.concatenate([state[e.name].detach().cpu().numpy().ravel() for e in entries])
            for key, entries in self.by_key.items()
        }

    def read(self, serialised: Mapping[str, bytes]) -> Packed:
        """Read arrays received in NumPy's ``.npy`` format and check them against this layout.

        The bytes are untrusted: arrays larger than expected are rejected before they are parsed,
        and every kind of invalid content raises the same kind of error.

        Raises:
            ValueError: as in ``unpack``.
        """
        self._check_known(serialised)
        packed: Packed = {}
        for key, entries in self.by_key.items():
            size, dtype = sum(e.size for e in entries), np.dtype(entries[0].dtype)
            content = serialised.get(key)
            if content is None:
                continue  # ``check`` reports the missing array
            if len(content) > size * dtype.itemsize + _LONGEST_HEADER:
                raise ValueError(
                    f"{key}: expected {size} values of {dtype}, got {len(content)} bytes"
                )
            try:
                # NEVER allow pickles: unpickling untrusted data executes code.
                packed[key] = np.lib.format.read_array(BytesIO(content), allow_pickle=False)
            except Exception as error:  # noqa: BLE001 - NumPy raises a dozen kinds
                raise ValueError(f"{key}: expected an array in NumPy's format, {error}") from None
        self.check(packed)
        return packed

    def _check_known(self, keys: Iterable[str]) -> None:
        extra = sorted(set(keys) - set(self.by_key))
        if extra:
            raise ValueError(f"{extra[0]}: expected only {', '.join(self.by_key) or 'no arrays'}")

    def unpack(self, packed: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Split flat arrays into a state dict.

        Raises:
            ValueError: if an array is missing, unknown, of a different dtype or length, or not
                finite. The message names the array.
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
        """Check received arrays against this layout.

        Raises:
            ValueError: as in ``unpack``.
        """
        self._check_known(packed)
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
