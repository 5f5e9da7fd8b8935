"""Gradient inversion recovers an image without privacy and fails with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from polyclinic.client.data.dataset import Examples
from polyclinic.configs.errors import ConfigError
from polyclinic.simulation.attacks import inversion as inversions
from polyclinic.simulation.attacks.inversion import (
    CLIPPED,
    FROM_WEIGHTS,
    PLAIN,
    SIDE,
    Case,
    Inversion,
    invert,
    picture_of,
    run_inversion,
    with_noise,
)

QUIET = Console(quiet=True)
FEW = 60  # iterations; the full attack uses more
NOISY = with_noise(1.0)


def test_inversion_without_privacy_recovers_the_image() -> None:
    assert invert(picture_of(0), PLAIN, 0, FEW, QUIET).correlation > 0.85


def test_inversion_from_sent_weights_recovers_the_image() -> None:
    assert invert(picture_of(0), FROM_WEIGHTS, 0, FEW, QUIET).correlation > 0.7


def test_inversion_with_noise_fails() -> None:
    """Pure noise gives correlations between -0.16 and 0.16."""
    found = invert(picture_of(0), NOISY, 0, FEW, QUIET)
    assert abs(found.correlation) < 0.25


def test_clipping_without_noise_keeps_the_gradient_direction() -> None:
    """The clipped gradient keeps its direction, which is all that the attack needs."""
    seen = [step_seen(case) for case in (PLAIN, CLIPPED, NOISY)]
    plain, clipped, noisy = (torch.cat([part.flatten() for part in parts]) for parts in seen)
    assert torch.cosine_similarity(plain, clipped, dim=0) > 0.999
    assert clipped.norm().item() == pytest.approx(1.0, abs=1e-3)
    assert torch.cosine_similarity(plain, noisy, dim=0).abs() < 0.02


def step_seen(case: Case) -> list[Tensor]:
    return inversions._step(inversions.network(), picture_of(0), case, 0)


def test_inversion_recovers_the_image_of_the_observed_step() -> None:
    """Negative control: the mask and the prior given to the attacker are not enough."""
    seen = step_seen(PLAIN)
    example, other = picture_of(0), picture_of(1)
    found = inversions.attack(inversions.network(), seen, "gradient", other, 0, FEW, QUIET)
    assert correlation(found, example) > 0.5  # even with the wrong mask
    assert correlation(found, other) < 0.5


def correlation(found: np.ndarray, example: Examples) -> float:
    return np.corrcoef(found.ravel(), example.images.ravel())[0, 1]


def test_attack_does_not_read_the_original_image() -> None:
    example = picture_of(0)
    seen = step_seen(PLAIN)
    without = replace(example, images=255 - example.images)
    found = [
        inversions.attack(inversions.network(), seen, "gradient", given, 0, 3, QUIET)
        for given in (example, without)
    ]
    np.testing.assert_array_equal(*found)


def test_figure_shows_original_and_all_inversions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inversions, "ITERATIONS", 2)
    path = tmp_path / "images" / "inversion.png"
    run_inversion(path, "1", 0, as_json=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["noise_multiplier"] for row in rows] == [None, None, 0.0, 1.0]
    assert all(-1 <= row["correlation"] <= 1 for row in rows)
    first = np.asarray(Image.open(path))[:: inversions.ENLARGED, :: inversions.ENLARGED]
    np.testing.assert_array_equal(first[:SIDE, :SIDE], picture_of(0).images[0, ..., 0])
    assert path.stat().st_size < 100_000


def test_inversion_is_reproducible_by_seed() -> None:
    once, again, other = (invert(picture_of(0), PLAIN, s, 3, QUIET).picture for s in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()


def test_inversion_table_has_one_row_per_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = np.zeros((SIDE, SIDE), np.uint8)
    monkeypatch.setattr(
        inversions, "invert", lambda example, case, *_: Inversion(case, blank, 0.5, 20.0)
    )
    run_inversion(None, "0.1,1", 0, as_json=False)
    out = capsys.readouterr().out
    for said in ("without privacy", "from weights", "clipping only", "noise 0.1", "noise 1"):
        assert said in out
    assert out.count("0.50") == 5


@pytest.mark.parametrize(
    ("name", "noise", "said"),
    [
        ("a.jpg", "1", r"--out: expected a file name ending in .png, got a.jpg"),
        ("a.png", "1;2", r"--noise: expected numbers above 0 separated by commas, got '1;2'"),
        ("a.png", "0", r"--noise: expected numbers above 0 separated by commas, got '0'"),
    ],
)
def test_invalid_inversion_arguments_are_refused(
    tmp_path: Path, name: str, noise: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_inversion(tmp_path / name, noise, 0, as_json=False)
