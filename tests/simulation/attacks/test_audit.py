"""The privacy audit: its lower bound is valid, and it detects broken mechanisms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyclinic.client.privacy.dp_sgd import Mechanism, train_one_round_privately, units_of
from polyclinic.configs.errors import ConfigError
from polyclinic.simulation.attacks import audit as audits
from polyclinic.simulation.attacks.audit import (
    CASES,
    CLIP_NORM,
    DELTA,
    PASS,
    Case,
    audit,
    best_bound,
    directions_of,
    lower_bound,
    p_value,
    run_audit,
)

STEP = CASES["step"]
MORE_NOISE = replace(STEP, noise_multiplier=2.0)  # epsilon 2, far below what the bugs leak
NETWORK = Case("network", noise_multiplier=2.0, canaries=100, network="small")


@pytest.mark.parametrize("guesses", [1, 10, 1000])
def test_lower_bound_of_all_correct_guesses_by_hand(guesses: int) -> None:
    """Each guess is correct with q = e^epsilon / (1 + e^epsilon), so that q^guesses = 0.05."""
    q = 0.05 ** (1 / guesses)
    by_hand = max(0.0, math.log(q / (1 - q)))
    assert lower_bound(1000, guesses, guesses, delta=0.0) == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_lower_bound_matches_the_paper(
    canaries: int, guesses: int, correct: int, delta: float, published: float
) -> None:
    """Appendix D and section 7 of arXiv 2305.08846v1."""
    assert lower_bound(canaries, guesses, correct, delta) == pytest.approx(published, abs=1e-3)


def test_p_value_with_delta_by_hand() -> None:
    """Three guesses, two correct, at epsilon 0: W is Binomial(3, 1/2) and P[W >= 2] = 1/2.

    One more correct guess suffices at W = 1 (3/8), two at W = 0 or 1 (4/8, halved); 3/8 is larger.
    """
    assert p_value(4, 3, 2, epsilon=0.0, delta=0.01) == pytest.approx(1 / 2 + 2 * 4 * 0.01 * 3 / 8)


def test_lower_bound_is_monotonic_in_its_arguments() -> None:
    bounds = [lower_bound(1000, 100, correct, 1e-5) for correct in range(0, 101, 5)]
    assert bounds == sorted(bounds)
    assert bounds[10] == 0.0  # half of the guesses are correct
    assert lower_bound(1000, 100, 90, 1e-3) < lower_bound(1000, 100, 90, 1e-5) < bounds[19]
    assert lower_bound(5000, 100, 90, 1e-4) < lower_bound(1000, 100, 90, 1e-4)
    assert lower_bound(1000, 100, 90, 1e-5, 0.99) < lower_bound(1000, 100, 90, 1e-5, 0.9)


def test_more_correct_guesses_than_guesses_are_refused() -> None:
    with pytest.raises(ValueError, match="correct guesses <= guesses <= canaries, got 5, 4, 10"):
        lower_bound(10, 4, 5, 1e-5)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_lower_bound_of_randomised_response_has_its_confidence(epsilon: float) -> None:
    """Each coin is revealed correctly with e^epsilon / (1 + e^epsilon), so epsilon is tight."""
    correct = stats.binom.rvs(200, 1 / (1 + math.exp(-epsilon)), size=2000, random_state=0)
    bounds = {v: [lower_bound(200, 200, v, 0.0, c) for c in (0.95, 0.5)] for v in set(correct)}
    wrong, wrong_at_half = np.mean([np.array(bounds[v]) > epsilon for v in correct], axis=0)
    assert wrong < 0.06
    assert 0.3 < wrong_at_half < 0.6  # negative control


def test_p_value_covers_a_mechanism_leaking_with_probability_delta() -> None:
    """Randomised response that reveals all coins with probability delta."""
    m, epsilon, delta = 50, 1.0, 0.01
    q = 1 / (1 + math.exp(-epsilon))
    assert p_value(m, m, m, epsilon, delta) >= delta + (1 - delta) * q**m
    assert p_value(m, m, m, epsilon, 0.0) < delta  # negative control


def test_sums_without_noise_recover_canaries_exactly() -> None:
    """Without noise, the released sum contains each included canary once and no other."""
    seen = sums_of(replace(STEP, canaries=60), broken(noise_multiplier=0.0))
    np.testing.assert_allclose(seen, seen.round(), atol=1e-4)
    assert 20 < seen.sum() < 40


def sums_of(case: Case, train_privately: Callable[..., object]) -> np.ndarray:
    """Record the attacker's observations of each canary, (steps, m)."""
    kept: list[np.ndarray] = []
    evidence = audits.evidence_of_canaries

    def keeping(sums: np.ndarray, *arguments: Any) -> np.ndarray:
        kept.append(sums)
        return evidence(sums, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audits, "evidence_of_canaries", keeping)
        audit(case, 0, train_privately)
    return kept[0]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.network == "linear"])
@pytest.mark.parametrize("seed", [0, 1])
def test_lower_bound_of_the_real_mechanism_stays_below_epsilon(name: str, seed: int) -> None:
    found = audit(CASES[name], seed)
    assert 1.0 < found.at_least < found.accounted


def test_lower_bound_is_large_at_large_epsilon() -> None:
    assert audit(CASES["little-noise"], 0).at_least > 3.0


def test_lower_bound_is_small_at_small_epsilon() -> None:
    found = audit(replace(STEP, noise_multiplier=10.0), 0)
    assert found.at_least <= found.accounted < 0.5


def test_lower_bound_with_system_randomness_stays_below_epsilon() -> None:
    found = audit(STEP)
    assert 0 < found.at_least < found.accounted


def test_random_evidence_gives_no_bound() -> None:
    """Negative control of the bound: evidence from unrelated coins."""
    random = np.random.default_rng(0)
    evidence, coins = random.standard_normal(1000), random.random(1000) < 0.5
    assert best_bound(evidence, coins, DELTA)[2] < 0.5


# Planted bugs: each is detected if the lower bound exceeds the accounted epsilon.


def broken(**changes: Any) -> Callable[..., object]:
    """Make a real round use another mechanism than the accounted one."""

    def train(*arguments: Any, mechanism: Mechanism, **settings: Any) -> object:
        changed = {
            name: change(mechanism) if callable(change) else change
            for name, change in changes.items()
        }
        return train_one_round_privately(
            *arguments, mechanism=replace(mechanism, **changed), **settings
        )

    return train


def clipping_the_mean(*arguments: Any, mechanism: Mechanism, **settings: Any) -> object:
    """Clip the batch's mean gradient instead of each unit's, with noise scaled as for a mean."""
    random = np.random.default_rng(0)
    deviation = mechanism.noise_multiplier * mechanism.clip_norm / mechanism.expected_units

    def clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, mechanism.clip_norm)
        for parameter in parameters:
            noise = random.standard_normal(tuple(parameter.shape), dtype=np.float32)
            parameter.grad += deviation * torch.from_numpy(noise)

    handle = register_optimizer_step_pre_hook(clip)
    try:
        return broken(noise_multiplier=0.0, clip_norm=1e9)(
            *arguments, mechanism=mechanism, **settings
        )
    finally:
        handle.remove()


BUGS = {
    "no noise": broken(noise_multiplier=0.0),
    "noise over the images of a pass": broken(noise_multiplier=lambda m: m.noise_multiplier / PASS),
    "noise not scaled by the clipping norm": broken(
        clip_norm=20.0, noise_multiplier=lambda m: m.noise_multiplier / 20
    ),
    "the batch's mean clipped, not the units": clipping_the_mean,
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_detected(bug: str) -> None:
    found = audit(MORE_NOISE, 0, BUGS[bug])
    assert found.at_least > 1.5 * found.accounted, found


def test_noise_of_one_third_is_detected_and_one_half_is_not() -> None:
    """Resolution of the audit; tests/client/privacy/test_dp_sgd.py measures the noise itself."""
    third, half = (audit(MORE_NOISE, 0, broken(noise_multiplier=2.0 / factor)) for factor in (3, 2))
    assert half.at_least < half.accounted < third.at_least


def test_missing_sampling_is_detected() -> None:
    """Every unit takes part in every step, while the accounting assumes one in ten."""
    always = broken(sample_rate=1.0, units=lambda m: round(m.expected_units))
    case = Case("sampled", noise_multiplier=2.0, sample_rate=0.1, steps=100)
    honest, found = audit(case, 0), audit(case, 0, always)
    assert honest.at_least < honest.accounted < found.at_least


def test_clipping_patient_images_one_by_one_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "polyclinic.client.privacy.dp_sgd.units_of",
        lambda examples, unit: units_of(examples, "example"),
    )
    found = audit(replace(CASES["patients"], noise_multiplier=2.0), 0)
    assert found.unit == "patient of 8"
    assert found.at_least > 1.5 * found.accounted


@pytest.mark.parametrize("gradients", ["ghost", pytest.param("hooks", marks=pytest.mark.long)])
def test_network_bound_holds_and_missing_noise_is_detected(gradients: str) -> None:
    case = replace(NETWORK, gradients=gradients)
    honest, found = audit(case, 0), audit(case, 0, BUGS["no noise"])
    assert honest.at_least < honest.accounted < found.at_least


def test_canaries_add_at_most_the_clip_norm() -> None:
    model, canaries = audits._small(replace(NETWORK, canaries=5), np.random.default_rng(0))
    norms = directions_of(model, canaries, "example").norm(dim=1)
    assert torch.all(norms <= CLIP_NORM + 1e-5)
    assert torch.all(norms > 0.9 * CLIP_NORM)


def test_too_many_canaries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"canaries: expected at most 1023, .* got 1024"):
        audit(replace(STEP, canaries=1024), 0)


def test_audit_command_prints_one_row_per_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_audit("step,patients", 0, as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)["audits"]
    assert [row["unit"] for row in rows] == ["example", "patient of 8"]
    assert all(0 < row["at_least"] < row["accounted"] for row in rows)
    assert run_audit("step", 0, as_json=False) == 0
    assert "lower bound" in capsys.readouterr().out


def test_audit_command_exits_1_on_a_violated_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audits, "audit", lambda case, seed: audit(case, seed, BUGS["no noise"]))
    assert run_audit("step", 0, as_json=True) == 1
    assert "the mechanism or the accounting is wrong" in capsys.readouterr().err


def test_unknown_audit_case_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--only: expected names among step, .* got 'stepp'"):
        run_audit("stepp", 0, as_json=True)
