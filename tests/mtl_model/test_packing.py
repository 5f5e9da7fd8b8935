"""Packing weights into few arrays and refusing invalid ones."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from polyclinic.mtl_model.packing import Layout, group_of_key
from polyclinic.mtl_model.tasks import group_of
from tests.factories import small


def test_pack_and_unpack_round_trip_bitwise() -> None:
    model = small(norm="group")
    layout = Layout.of(model)
    packed = layout.pack(model.state_dict())
    assert list(packed) == ["classification/float32", "encoder/float32", "segmentation/float32"]
    for name, tensor in layout.unpack(packed).items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_batch_norm_counters_are_packed_separately() -> None:
    layout = Layout.of(small(norm="batch"))
    assert "encoder/int64" in layout.by_key


def test_group_of_assigns_every_part_to_a_task() -> None:
    groups = {name.partition(".")[0]: group_of(name) for name in small().state_dict()}
    assert groups == {
        "encoder": "encoder",
        "dfe": "segmentation",
        "decoder": "segmentation",
        "head": "classification",
    }
    assert group_of("uncertainty.classification.value") == "classification"
    with pytest.raises(ValueError, match=r"stem.weight: expected a name under encoder"):
        group_of("stem.weight")
    with pytest.raises(ValueError, match="other/float32"):
        group_of_key("other/float32")


def test_layout_digest_differs_between_networks() -> None:
    digests = {Layout.of(small(**c)).digest for c in ({}, {"dfe": "sum"}, {"norm": "batch"})}
    assert len(digests) == 3
    assert Layout.of(small()).digest == Layout.of(small()).digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.pop("encoder/float32"), "encoder/float32: expected .* got nothing"),
        (lambda p: p.update({"extra/float32": np.zeros(1)}), "extra/float32: expected only"),
        (
            lambda p: p.update({"encoder/float32": p["encoder/float32"][:-1]}),
            "encoder/float32: expected .* got shape",
        ),
        (
            lambda p: p.update({"encoder/float32": p["encoder/float32"].astype(np.float64)}),
            "of float64",
        ),
        (
            lambda p: p["encoder/float32"].__setitem__(3, np.nan),
            "encoder/float32: expected finite values, got 1 of",
        ),
    ],
)
def test_mismatched_arrays_are_refused_by_name(change, said: str) -> None:
    model = small()
    layout = Layout.of(model)
    packed = layout.pack(model.state_dict())
    change(packed)
    with pytest.raises(ValueError, match=said):
        layout.unpack(packed)


def bytes_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_layout_reads_saved_arrays_unchanged() -> None:
    layout = Layout.of(small())
    packed = layout.pack(small().state_dict())
    read = layout.read({key: bytes_of(array) for key, array in packed.items()})
    assert all(np.array_equal(read[key], packed[key]) for key in packed)


HEADER = b"\x93NUMPY\x01\x00"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"xx",
        b"PK\x03\x04" + bytes(60),  # a zip file, which np.load would open
        b"\x80\x04K\x01.",  # a pickle
        HEADER + b"\xff\xff",
        HEADER + b"\x10\x00" + b"(((((((((((((((\n",
        HEADER
        + b"\x46\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (10**15,), }".ljust(69)
        + b"\n",
        HEADER
        + b"\x56\x00"
        + b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }".ljust(85)
        + b"\n",
    ],
)
def test_invalid_array_bytes_are_refused(content: bytes) -> None:
    layout = Layout.of(small())
    with pytest.raises(ValueError, match=r"encoder/float32: expected an array in NumPy's format"):
        layout.read({"encoder/float32": content})


def test_oversized_array_bytes_are_refused_unread() -> None:
    layout = Layout.of(small())
    with pytest.raises(ValueError, match=r"expected \d+ values of float32, got 90000128 bytes"):
        layout.read({"encoder/float32": bytes_of(np.zeros(22_500_000, np.float32))})
