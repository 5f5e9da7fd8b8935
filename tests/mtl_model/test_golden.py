"""Outputs of tiny networks against those recorded by tests/make_golden.py."""

from __future__ import annotations

import json

import pytest

from tests.make_golden import GOLDEN, MEMBERS, answers


@pytest.mark.parametrize("name", MEMBERS)
def test_tiny_network_matches_golden_outputs(name: str) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    for part, found in answers(MEMBERS[name]).items():
        assert found == pytest.approx(expected[part], rel=1e-6, abs=1e-6), part


def test_golden_outputs_differ_between_networks() -> None:
    """Golden outputs that did not depend on the network would prove nothing."""
    first, *others = [json.loads(GOLDEN.read_text())[name]["class"] for name in MEMBERS]
    assert all(other != pytest.approx(first, rel=1e-3) for other in others)
