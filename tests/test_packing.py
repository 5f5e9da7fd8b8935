"""Packing weights into few arrays, and refusing what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl_model.packing import Layout, group_of_key
from mtl_model.tasks import group_of
from tests.test_network import small


def test_weights_come_back_bit_by_bit_from_three_arrays() -> None:
    model = small(norm="group")
    layout = Layout.of(model)
    packed = layout.pack(model.state_dict())
    assert list(packed) == ["classification/float32", "encoder/float32", "segmentation/float32"]
    for name, tensor in layout.unpack(packed).items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_batch_norms_counters_travel_apart_from_weights() -> None:
    layout = Layout.of(small(norm="batch"))
    assert "encoder/int64" in layout.by_key


def test_every_part_of_the_network_belongs_to_a_task() -> None:
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


def test_another_network_has_another_digest() -> None:
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
def test_arrays_that_do_not_fit_are_refused_by_name(change, said: str) -> None:
    model = small()
    layout = Layout.of(model)
    packed = layout.pack(model.state_dict())
    change(packed)
    with pytest.raises(ValueError, match=said):
        layout.unpack(packed)
