"""Privacy accounting: by formula, against Google's dp-accounting, and at extreme values."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from polyclinic.client.privacy import accounting
from polyclinic.client.privacy.accounting import (
    PRECISION,
    DpEvent,
    bound,
    epsilon,
    epsilon_rdp,
    noise_for,
)
from tests import ROOT

DELTA = 1e-5
HISTORIES = {
    "a round": [DpEvent(1.0, 0.05, 10)],
    "a run": [DpEvent(1.1, 0.05, 1000)],
    "little noise": [DpEvent(0.6, 0.02, 200)],
    "much noise": [DpEvent(20.0, 0.1, 500)],
    "two runs": [DpEvent(1.0, 0.05, 100), DpEvent(2.0, 0.1, 300)],
    "three sizes": [DpEvent(1.3, 0.01, 500), DpEvent(0.9, 0.08, 40), DpEvent(4.0, 0.3, 60)],
    "all units at once": [DpEvent(8.0, 1.0, 20)],
    "some at once": [DpEvent(8.0, 1.0, 5), DpEvent(1.5, 0.05, 100)],
}


def google(history: list[DpEvent], accountant) -> object:
    event = pytest.importorskip("dp_accounting", reason="pip install --group test").dp_event
    for spent in history:
        step = event.GaussianDpEvent(spent.noise_multiplier)
        step = event.PoissonSampledDpEvent(spent.sample_rate, step)
        accountant.compose(event.SelfComposedDpEvent(step, spent.steps))
    return accountant


def google_pld(history: list[DpEvent], delta: float) -> float:
    pld = pytest.importorskip("dp_accounting.pld", reason="pip install --group test")
    return google(history, pld.PLDAccountant()).get_epsilon(delta)


def google_rdp(history: list[DpEvent], delta: float) -> float:
    rdp = pytest.importorskip("dp_accounting.rdp", reason="pip install --group test")
    return google(history, rdp.RdpAccountant(accounting._ORDERS)).get_epsilon(delta)


@pytest.fixture
def whole_orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(accounting, "_ORDERS", tuple(range(2, 64)))
    accounting._rdp_of_a_step.cache_clear()
    yield
    accounting._rdp_of_a_step.cache_clear()


def agrees(found: float, reference: float) -> bool:
    """Whether a bound is at most 0.1 percent below and 2 percent above the reference."""
    return reference * 0.999 <= found <= reference * 1.02


@pytest.mark.parametrize(
    ("name", "delta"), [*((name, 1e-6) for name in HISTORIES), ("a run", 1e-3), ("two runs", 1e-9)]
)
def test_prv_agrees_with_google_pld_accountant(name: str, delta: float) -> None:
    found = bound(HISTORIES[name], delta)
    assert found.by == "prv"
    assert agrees(found.epsilon, google_pld(HISTORIES[name], delta))


@pytest.mark.parametrize("name", HISTORIES)
def test_rdp_agrees_with_google_at_integer_orders(name: str, whole_orders: None) -> None:
    expected = google_rdp(HISTORIES[name], DELTA)
    assert epsilon_rdp(HISTORIES[name], DELTA) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["little noise", "three sizes"])
def test_rdp_at_fractional_orders_is_slightly_below_google(name: str) -> None:
    """Google sums the magnitudes of an alternating series, which is slightly larger."""
    expected = google_rdp(HISTORIES[name], DELTA)
    assert 0.99 * expected <= epsilon_rdp(HISTORIES[name], DELTA) <= expected


@pytest.mark.parametrize("name", HISTORIES)
def test_prv_bound_is_below_rdp_bound(name: str) -> None:
    assert epsilon(HISTORIES[name], DELTA) < epsilon_rdp(HISTORIES[name], DELTA)


def test_comparison_detects_a_miscounting_accountant() -> None:
    history = HISTORIES["two runs"]
    reference = google_pld(history, DELTA)
    assert agrees(epsilon(history, DELTA), reference)
    assert not agrees(epsilon(history[:1], DELTA), reference)
    assert not agrees(epsilon([DpEvent(1.5, 0.05, 100), history[1]], DELTA), reference)
    assert not agrees(epsilon([DpEvent(1.0, 0.04, 100), history[1]], DELTA), reference)


@pytest.mark.parametrize("noise", [0.7, 3.0, 30.0])
@pytest.mark.parametrize("steps", [1, 25])
def test_epsilon_at_rate_1_matches_gaussian_mechanism(noise: float, steps: int) -> None:
    mean = math.sqrt(steps) / noise  # composed Gaussians equal one with this signal-to-noise ratio

    def delta_at(eps: float) -> float:
        return norm.cdf(mean / 2 - eps / mean) - math.exp(eps) * norm.cdf(-mean / 2 - eps / mean)

    exact = brentq(lambda eps: delta_at(eps) - DELTA, 0, 100)
    assert exact <= epsilon([DpEvent(noise, 1.0, steps)], DELTA) <= 1.02 * exact


def test_epsilon_of_an_empty_history_is_zero() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([DpEvent(0.0, 0.1, 0)], DELTA) == 0
    assert epsilon_rdp([], DELTA) == 0


@pytest.mark.parametrize("noise", [0.0, 1e-300, 1e-160, 1e-4])
def test_epsilon_without_noise_is_infinite(noise: float) -> None:
    assert epsilon([DpEvent(2.0, 0.1, 10), DpEvent(noise, 0.1, 1)], DELTA) == math.inf
    assert epsilon_rdp([DpEvent(noise, 1.0, 1)], DELTA) == math.inf


@pytest.mark.parametrize(
    ("spent", "by"),
    [
        (DpEvent(1e-3, 0.1, 10), "rdp"),  # PRV would need a grid up to epsilon 5 million
        (DpEvent(0.1, 0.2, 10_000), "rdp"),  # 148 GB
        (DpEvent(0.3, 0.01, 10_000), "rdp"),
        (DpEvent(1.0, 0.001, 10**8), "rdp"),
        (DpEvent(0.1, 0.01, 100), "rdp"),  # PRV overflows and still returns a number
        (DpEvent(1.0, 0.001, 10**6), "prv"),
        (DpEvent(1.0, 1e-15, 1000), "prv"),
        (DpEvent(1.0, 1 - 1e-16, 10), "prv"),
        (DpEvent(1e200, 0.3, 10), "prv"),
        (DpEvent(1.0, 0.01, 1), "prv"),
    ],
)
def test_bound_at_extreme_settings_is_finite(spent: DpEvent, by: str) -> None:
    found = bound([spent], DELTA)
    assert found.by == by
    assert 0 < found.epsilon < math.inf
    assert found.epsilon <= epsilon_rdp([spent], DELTA)


@pytest.mark.parametrize("delta", [0.9, 1e-2, 1e-9, 1e-14])
def test_bound_is_never_negative(delta: float) -> None:
    assert epsilon([DpEvent(50.0, 0.001, 1)], delta) >= 0
    assert epsilon_rdp([DpEvent(50.0, 0.001, 1)], delta) >= 0


def test_bound_at_very_small_delta_uses_rdp() -> None:
    assert bound([DpEvent(1.0, 0.05, 10)], 1e-9).by == "prv"
    assert bound([DpEvent(1.0, 0.05, 10)], 1e-14).by == "rdp"


def test_epsilon_grows_with_steps_rate_and_smaller_noise_or_delta() -> None:
    for worse in (
        [epsilon([DpEvent(1.2, 0.05, steps)], DELTA) for steps in (1, 2, 10, 11, 200, 5000)],
        [epsilon([DpEvent(noise, 0.05, 50)], DELTA) for noise in (50.0, 5.0, 1.0, 0.9, 0.4, 0.05)],
        [epsilon([DpEvent(1.2, rate, 50)], DELTA) for rate in (1e-4, 0.01, 0.011, 0.3, 0.99, 1.0)],
        [epsilon([DpEvent(1.2, 0.05, 50)], delta) for delta in (1e-2, 1e-4, 1e-5, 1e-8, 1e-11)],
        [epsilon([DpEvent(1.2, 0.05, 50), DpEvent(3.0, 0.1, n)], DELTA) for n in (0, 1, 20)],
    ):
        assert worse == sorted(set(worse))


def test_equal_events_are_merged_in_any_order() -> None:
    rounds = [DpEvent(1.1, 0.05, 1)] * 900 + [DpEvent(2.0, 0.1, 7)] + [DpEvent(1.1, 0.05, 1)] * 100
    assert accounting._merged(rounds, DELTA) == (DpEvent(1.1, 0.05, 1000), DpEvent(2.0, 0.1, 7))
    assert accounting._merged(rounds[::-1], DELTA) == accounting._merged(rounds, DELTA)


def test_grouped_events_give_an_upper_bound() -> None:
    stretches = tuple(DpEvent(1.0 + i / 50, 0.05 + i / 1000, 20) for i in range(5))
    grouped = accounting._grouped(stretches, 2)
    assert len(grouped) <= 2
    assert sum(spent.steps for spent in grouped) == 100
    each = epsilon(stretches, DELTA)
    assert each < epsilon(grouped, DELTA) < 1.1 * each
    assert accounting._grouped(stretches, 5) == stretches


@pytest.mark.parametrize(
    ("target", "rate", "steps", "before"),
    [
        (3.0, 0.05, 1000, []),
        (0.1, 0.2, 20, []),
        (1.0, 1.0, 10, []),
        (3.0, 0.05, 100, [DpEvent(1.5, 0.05, 100)]),
        # by the RDP bound this history has already spent the target
        (2.0, 0.05, 50, [DpEvent(1.05, 0.05, 20)]),
    ],
)
def test_noise_for_meets_target_without_excess(target, rate, steps, before) -> None:
    noise = noise_for(target, DELTA, rate, steps, before)
    assert epsilon([*before, DpEvent(noise, rate, steps)], DELTA) <= target
    assert epsilon([*before, DpEvent(noise / (1 + PRECISION) ** 2, rate, steps)], DELTA) > target


def test_rdp_bound_exceeds_a_target_that_prv_meets() -> None:
    assert epsilon_rdp([DpEvent(1.05, 0.05, 20)], DELTA) > 2


def test_noise_for_an_already_spent_target_is_refused() -> None:
    before = [DpEvent(1.0, 0.05, 100)]
    with pytest.raises(ValueError, match=r"epsilon 3\.\d+ of 2 is spent already"):
        noise_for(2.0, DELTA, 0.05, 10, before)


def test_noise_for_an_unreachable_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10000000000 steps .* cannot stay within epsilon 0\.001"):
        noise_for(0.001, DELTA, 1.0, 10**10)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DpEvent(-1.0, 0.1, 1), "noise multiplier"),
        (lambda: DpEvent(math.nan, 0.1, 1), "noise multiplier"),
        (lambda: DpEvent(math.inf, 0.1, 1), "noise multiplier"),
        (lambda: DpEvent(1.0, 0.0, 1), "sample rate"),
        (lambda: DpEvent(1.0, 1.1, 1), "sample rate"),
        (lambda: DpEvent(1.0, math.nan, 1), "sample rate"),
        (lambda: DpEvent(1.0, 0.1, -1), "steps"),
        (lambda: DpEvent(1.0, 0.1, 1.5), "steps"),
        (lambda: epsilon([], 0.0), "delta"),
        (lambda: epsilon([], 1.0), "delta"),
        (lambda: epsilon_rdp([], math.nan), "delta"),
        (lambda: noise_for(0.0, DELTA, 0.1, 1), "target epsilon"),
        (lambda: noise_for(math.inf, DELTA, 0.1, 1), "target epsilon"),
        (lambda: noise_for(1.0, DELTA, 2.0, 1), "sample rate"),
    ],
)
def test_out_of_range_arguments_are_refused_by_name(make, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}: expected"):
        make()


def test_accounting_import_does_not_load_opacus_torch_or_numpy() -> None:
    code = "import sys, polyclinic.client.privacy.accounting as _; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"opacus", "torch", "numpy"} & set(done.stdout.split())
    assert "polyclinic.client.privacy.accounting" in done.stdout.split()
