"""Averaging by task: by hand, and by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.server.aggregation.averaging import Contribution, average_by_task


def contribution(site: str, value: float, encoder: int, masks: int, labels: int) -> Contribution:
    weights = {
        f"{group}/float32": np.full(2, value, np.float32)
        for group in ("encoder", "segmentation", "classification")
    }
    weights["encoder/int64"] = np.array([int(value)])
    counts = {"encoder": encoder, "segmentation": masks, "classification": labels}
    return Contribution(site, weights, counts)


NOW = contribution("now", 9.0, 0, 0, 0).weights


def test_average_weights_each_group_by_its_examples() -> None:
    averaged = average_by_task(
        [contribution("a", 1.0, 30, 0, 30), contribution("b", 5.0, 10, 10, 0)], NOW
    )
    assert averaged["encoder/float32"].tolist() == [2.0, 2.0]  # (30 * 1 + 10 * 5) / 40
    assert averaged["segmentation/float32"].tolist() == [5.0, 5.0]  # only b has masks
    assert averaged["classification/float32"].tolist() == [1.0, 1.0]  # only a has labels


def test_untrained_group_stays_unchanged() -> None:
    averaged = average_by_task([contribution("a", 1.0, 3, 0, 3)], NOW)
    assert averaged["segmentation/float32"].tolist() == [9.0, 9.0]


def test_integer_arrays_come_from_the_largest_site() -> None:
    averaged = average_by_task(
        [contribution("a", 4.0, 10, 1, 1), contribution("b", 7.0, 11, 1, 1)], NOW
    )
    assert averaged["encoder/int64"].tolist() == [7]
    assert averaged["encoder/int64"].dtype == np.int64


values = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(values, st.integers(1, 1000)), min_size=1, max_size=6), st.randoms())
def test_average_lies_between_sites_and_ignores_their_order(sites, rng) -> None:
    parts = [contribution(f"s{i}", v, n, n, n) for i, (v, n) in enumerate(sites)]
    first = average_by_task(parts, NOW)
    shuffled = parts[:]
    rng.shuffle(shuffled)
    again = average_by_task(shuffled, NOW)
    for key, array in first.items():
        assert np.array_equal(array, again[key])
        assert array.dtype == NOW[key].dtype
    low, high = min(v for v, _ in sites), max(v for v, _ in sites)
    mean = first["encoder/float32"][0]
    assert low - 1e-4 <= mean <= high + 1e-4
    exact = sum(v * n for v, n in sites) / sum(n for _, n in sites)
    assert mean == pytest.approx(exact, rel=1e-5, abs=1e-4)
