"""Central differential privacy: sensitivity to one site, noise, adaptive clipping and epsilon."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
)
from flwr.supercore.differential_privacy import clip_inputs_inplace
from rich.console import Console
from safetensors.torch import load_file
from scipy import stats

from polyclinic.configs import wire
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.central import CentralConfig
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.mtl_model.tasks import GROUPS, Group
from polyclinic.server.aggregation.averaging import Contribution, average_by_task
from polyclinic.server.aggregation.central_accounting import PRECISION, central_epsilon, delta_at
from polyclinic.server.aggregation.central_dp import (
    AdaptiveClipping,
    CentralPrivacy,
    noise_to_update,
    sites_by_group,
)
from polyclinic.server.aggregation.strategies import (
    AverageByTask,
    contribution_of,
    message_of,
    packed_of,
    record_of,
)
from polyclinic.server.app import run
from polyclinic.server.export.model_card import _privacy, _procedure
from polyclinic.server.rounds.errors import RunFailed
from polyclinic.server.runs.central_releases import CentralRelease, read_releases, write_releases
from polyclinic.server.runs.display import Display
from polyclinic.server.runs.history import POOLED, read_history
from polyclinic.server.runs.tables import central_text, spent_text
from tests.factories import network, trained

pytestmark = pytest.mark.usefixtures("flower_identity")

QUIET = 1e-20  # a noise multiplier too small to affect the assertions
ALL = (2, 2, 2)


def packed(*groups: Sequence[float] | np.ndarray) -> Packed:
    """Make weights of encoder, segmentation and classification in float64, to avoid rounding."""
    return {
        f"{group}/float32": np.array(values, np.float64)
        for group, values in zip(GROUPS, groups, strict=True)
    }


def update(
    site: str, *groups: Sequence[float] | np.ndarray, counts: tuple[int, int, int] = (5, 5, 5)
) -> Contribution:
    return Contribution(site, packed(*groups), dict(zip(GROUPS, counts, strict=True)))


ZERO = packed([0.0], [0.0], [0.0])


@pytest.fixture
def central(tmp_path: Path) -> Callable[..., CentralPrivacy]:
    """Build CentralPrivacy for a number of sites per group, with noise seeded by ``random``."""
    made = 0

    def make(
        sites: tuple[int, int, int] = ALL, random: int = 0, noise: float = QUIET, **settings: object
    ) -> CentralPrivacy:
        nonlocal made
        made += 1
        if noise == QUIET:
            settings = {"clipped_count_stddev": 1e-12, **settings}
        config = CentralConfig(**{"mode": "fixed", "noise_multiplier": noise, **settings})
        return CentralPrivacy(
            config,
            dict(zip(GROUPS, sites, strict=True)),
            tmp_path / f"central-{made}.json",
            entropy=lambda: np.random.Philox(random),
        )

    return make


def values(weights: Packed) -> list[float]:
    return [float(x) for array in weights.values() for x in array]


# One round, by hand


def test_update_is_clipped_by_its_joint_norm(central) -> None:
    far, near = update("a", [3.0], [0.0], [4.0]), update("b", [0.0], [0.6], [0.0])
    averaged = central(clip_norm=1.0).average(1, [far, near], ZERO)
    assert values(averaged) == pytest.approx([0.3, 0.3, 0.4])  # (3, 0, 4) / 5 and b, over 2


def test_clipping_applies_to_the_update_not_the_weights(central) -> None:
    now = packed([100.0], [50.0], [-7.0])
    averaged = central(clip_norm=1.0).average(1, [update("a", [103.0], [50.0], [-3.0])], now)
    assert values(averaged) == pytest.approx([100.3, 50.0, -6.6])


def test_sites_have_equal_weight_for_any_example_count(central) -> None:
    sites = [
        update("a", [1.0], [0.0], [0.0], counts=(1000, 1, 7)),
        update("b", [0.0], [1.0], [0.0], counts=(1, 900, 7)),
    ]
    assert values(central(clip_norm=9.0).average(1, sites, ZERO)) == pytest.approx([0.5, 0.5, 0.0])


def test_missing_site_adds_zero_and_stays_in_the_denominator(central, caplog) -> None:
    averaged = central((4, 4, 4), clip_norm=9.0).average(
        3, [update("a", [1.0], [2.0], [4.0])], ZERO
    )
    assert values(averaged) == pytest.approx([0.25, 0.5, 1.0])
    assert "round 3: 3 of 4 sites have no update" in caplog.text


def test_task_is_divided_by_its_declared_sites(central) -> None:
    sites = [
        update("a", [1.0], [7.0], [1.0], counts=(9, 0, 9)),  # no masks, so the 7 was never trained
        update("b", [1.0], [1.0], [1.0]),
        update("c", [1.0], [1.0], [1.0]),
    ]
    averaged = central((3, 2, 3), clip_norm=9.0).average(1, sites, ZERO)
    assert values(averaged) == pytest.approx([1.0, 1.0, 1.0])


def test_undeclared_task_stays_bitwise_unchanged(central) -> None:
    now = packed([1.0], [1 / 3, 0.1], [1.0])
    sites = [update("a", [2.0], [5.0, 5.0], [2.0])]
    averaged = central((2, 0, 2), noise=1.0).average(1, sites, now)
    assert np.array_equal(averaged["segmentation/float32"], now["segmentation/float32"])
    assert averaged["encoder/float32"] != 1.0


def test_average_without_noise_or_clipping_matches_average_by_task(central) -> None:
    random = np.random.default_rng(0)
    now = {
        key: random.normal(size=5).astype(np.float32)
        for key in ("encoder/float32", "segmentation/float32", "classification/float32")
    }
    sites = [
        Contribution(
            name,
            {key: (array + random.normal(size=5)).astype(np.float32) for key, array in now.items()},
            dict(zip(GROUPS, counts, strict=True)),
        )
        for name, counts in (("a", (1, 1, 0)), ("b", (1, 0, 1)), ("c", (1, 1, 1)))
    ]
    averaged = central((3, 2, 2), clip_norm=1e6).average(1, sites, now)
    for key, array in average_by_task(sites, now).items():
        assert averaged[key].dtype == array.dtype == np.float32
        np.testing.assert_allclose(averaged[key], array, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_zero_update_is_averaged_without_error(central, mode: str) -> None:
    sites = [update("a", [1.0], [0.0], [0.0]), update("b", [0.0], [0.0], [0.0])]
    averaged = central(mode=mode, clip_norm=9.0).average(1, sites, ZERO)
    assert values(averaged) == pytest.approx([0.5, 0.0, 0.0])
    with pytest.raises(ZeroDivisionError):  # once Flower no longer raises, pass such sites on
        clip_inputs_inplace([np.zeros(3)], 1.0)


def test_integer_arrays_are_refused_by_name(central) -> None:
    counted = {**ZERO, "encoder/int64": np.array([3])}
    with pytest.raises(ValueError, match=r"encoder/int64: expected floating-point numbers"):
        central().average(1, [], counted)


# Sensitivity to one site


def noise_free_change(
    make: Callable[..., CentralPrivacy],
    sites: Sequence[Contribution],
    declared: tuple[int, int, int],
    **settings: object,
) -> float:
    """Compute the largest change of the released sum caused by one site's participation.

    The noise on a group's sum has the same deviation for every group, so changes of an average are
    multiplied by the group's denominator.
    """
    size = {key: np.zeros(array.shape) for key, array in sites[0].weights.items()}
    whole = make(declared, **settings).average(1, sites, size)
    found = 0.0
    for one in sites:
        rest = [c for c in sites if c is not one]
        without = make(declared, **settings).average(1, rest, size)
        change = [
            count * (whole[key] - without[key]) for key, count in zip(whole, declared, strict=True)
        ]
        found = max(found, float(np.linalg.norm(np.concatenate(change))))
    return found


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("declared", [(4, 4, 4), (4, 1, 3)])
def test_one_site_changes_the_sum_by_at_most_the_clip_norm(
    central, mode: str, size: float, declared: tuple[int, int, int]
) -> None:
    random = np.random.default_rng(1)
    others = [update(s, *random.normal(size=(3, 50)), counts=(7, 7, 0)) for s in "abc"]
    one = update("d", *(size * random.normal(size=(3, 50))), counts=(9000, 1, 1))
    settings = {"mode": mode, "clip_norm": 2.0, "random": 3, "noise": 0.5}
    change = noise_free_change(central, [*others, one], declared, **settings)
    assert change <= 2.0 * (1 + 1e-9)
    assert change > 2.0 * (1 - 1e-9)  # the other updates are clipped, so the bound is tight


def test_average_by_examples_exceeds_the_clip_norm_bound() -> None:
    """Negative control: clipped updates weighted as without central privacy."""
    few = [update(s, [1.0], [0.0], [0.0], counts=(1, 1, 1)) for s in "abc"]
    many = update("d", [-1.0], [0.0], [0.0], counts=(997, 1, 1))
    whole, without = (average_by_task(c, ZERO)["encoder/float32"] for c in ([*few, many], few))
    assert abs(4 * (whole - without)[0]) > 7.9  # with a clip norm of 1


# Noise


def p_value(noise: np.ndarray, claimed: float) -> float:
    """Return the two-sided p-value of the noise under the claimed standard deviation."""
    below = stats.chi2.cdf(((noise / claimed) ** 2).sum(), noise.size)
    return 2 * min(below, 1 - below)


MANY = packed(*np.zeros((3, 4000)))


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize(("sigma", "clip"), [(1.0, 1.0), (0.7, 3.0)])
@pytest.mark.parametrize("answering", [0, 1, 3])
def test_noise_deviation_matches_the_accounted_one(
    central, mode: str, sigma: float, clip: float, answering: int
) -> None:
    sites = [update(f"s{k}", *np.full((3, 4000), clip)) for k in range(answering)]
    settings = {"mode": mode, "clip_norm": clip, "clipped_count_stddev": 2.0, "clip_norm_lr": 3.0}
    private = central((5, 2, 5), noise=sigma, **settings)
    exact = central((5, 2, 5), **settings).average(1, sites, MANY)
    noisy = private.average(1, sites, MANY)
    # noise of the weights only; the adaptive count's noise uses part of the multiplier
    of_weights = sigma if mode == "fixed" else (sigma**-2 - (2 * 2.0) ** -2) ** -0.5
    for key, sites_of_group in zip(noisy, (5, 2, 5), strict=True):
        noise = noisy[key] - exact[key]
        deviation = of_weights * clip / sites_of_group
        assert p_value(noise, deviation) > 1e-3
        for wrong in (2 / 3, 3 / 2):  # negative controls
            assert p_value(noise, wrong * deviation) < 1e-9


def test_noise_scale_uses_the_clip_norm_of_the_same_round(central) -> None:
    private = central((2, 2, 2), mode="adaptive", noise=0.5, clip_norm_lr=3.0, clip_norm=1.0)
    noise = np.array(values(private.average(1, [], MANY)))
    assert not 2 / 3 < private.clip_norm < 3 / 2
    scale = private.wrapper.noise_multiplier / 2
    assert p_value(noise, scale * 1.0) > 1e-3
    assert p_value(noise, scale * private.clip_norm) < 1e-9


def test_flower_scales_noise_by_the_next_clip_norm() -> None:
    """When this fails, Flower has fixed it, and AdaptiveClipping need not delay the norm."""
    theirs = DifferentialPrivacyServerSideAdaptiveClipping(
        AverageByTask(lambda _, current: current), 0.5, 2, 1.0, 0.5, 3.0, 0.5
    )
    theirs.strategy.sent = MANY
    theirs.current_arrays = record_of(MANY)
    change = update("a", *np.full((3, 4000), 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "_noisy_fraction", lambda count, total: 1.0)
        released, _ = theirs.aggregate_train(1, [message_of(change)])
    noise = np.array(values(packed_of(released)))
    assert theirs.clipping_norm == pytest.approx(math.exp(-1.5))
    assert p_value(noise, theirs.noise_multiplier * 1.0 / 2) < 1e-9
    assert p_value(noise, theirs.noise_multiplier * theirs.clipping_norm / 2) > 1e-6


def test_noise_does_not_depend_on_the_global_seed(tmp_path: Path) -> None:
    """Flower draws from NumPy's global generator, which any code in the process may have seeded."""
    config = CentralConfig(mode="fixed")

    def noise(name: str) -> list[float]:
        np.random.seed(0)
        np.random.normal()  # normals come in pairs; the generator keeps the second
        private = CentralPrivacy(config, dict.fromkeys(GROUPS, 2), tmp_path / name)
        return values(private.average(1, [], ZERO))

    once, again = noise("once"), noise("again")
    assert len({*once, *again}) == 6
    np.random.seed(0)
    np.random.random()
    expected = np.random.random()
    np.random.seed(0)
    np.random.random()
    CentralPrivacy(config, dict.fromkeys(GROUPS, 2), tmp_path / "third").average(1, [], ZERO)
    assert np.random.random() == expected  # the global generator is unaffected


def test_flower_noise_repeats_with_the_global_seed() -> None:
    """Negative control of the test above."""

    def noise() -> list[float]:
        theirs = DifferentialPrivacyServerSideFixedClipping(
            AverageByTask(lambda _, current: current), 1.0, 1.0, 2
        )
        theirs.strategy.sent = ZERO
        np.random.seed(0)
        return values(packed_of(theirs.aggregate_train(1, [])[0]))

    assert noise() == noise()


# The adaptive norm


def of_norms(*norms: float) -> list[Contribution]:
    return [update(f"s{k}", [norm], [0.0], [0.0]) for k, norm in enumerate(norms)]


@pytest.mark.parametrize(
    ("norms", "target", "share"),
    [
        ((0.5, 2.0, 3.0, 4.0), 0.5, 3 / 4),
        ((0.5, 0.6, 0.7, 0.8), 0.5, 0.0),
        ((0.5, 2.0, 3.0, 4.0), 0.75, 3 / 4),
        ((0.5, 2.0, 3.0), 0.5, 2.5 / 4),  # a missing site counts one half
        ((), 0.5, 1 / 2),
    ],
)
def test_adaptive_clip_norm_follows_the_formula(
    central, norms: tuple[float, ...], target: float, share: float
) -> None:
    private = central((4, 4, 4), mode="adaptive", target_clipped_quantile=target, clip_norm_lr=0.3)
    private.average(1, of_norms(*norms), ZERO)
    assert private.clip_norm == pytest.approx(math.exp(0.3 * (share - target)))


def test_adaptive_clip_norm_converges_to_the_quantile(central) -> None:
    for start in (0.1, 30.0):
        private = central((5, 5, 5), mode="adaptive", clip_norm=start, target_clipped_quantile=0.4)
        for number in range(45):
            private.average(number, of_norms(1.0, 2.0, 3.0, 4.0, 5.0), ZERO)
        # a norm below 3 clips three of the five sites, a norm above 4 one
        assert 2.9 < private.clip_norm < 4.1


def test_flower_adaptive_clip_norm_diverges() -> None:
    """When this fails, Flower has fixed it, and AdaptiveClipping must not flip the sign."""
    for start, ends in ((1.0, 0.0), (100.0, math.inf)):
        theirs = DifferentialPrivacyServerSideAdaptiveClipping(
            AverageByTask(), 1e-12, 4, start, clipped_count_stddev=1e-11
        )
        for number in range(200):
            theirs.strategy.sent = ZERO
            theirs.current_arrays = record_of(ZERO)
            theirs.aggregate_train(number, [message_of(c) for c in of_norms(2.0, 3.0, 4.0, 5.0)])
        away = theirs.clipping_norm
        assert away < 1e-6 if ends == 0.0 else away > 1e6


def test_one_site_changes_the_clip_count_by_one_half(central) -> None:
    for norm in (0.5, 2.0):
        moved = []
        for norms in ((0.5, 2.0, norm), (0.5, 2.0)):
            private = central((3, 3, 3), mode="adaptive", clip_norm_lr=1.0)
            private.average(1, of_norms(*norms), ZERO)
            moved.append(3 * math.log(private.clip_norm))  # the count plus a constant
        assert abs(moved[0] - moved[1]) == pytest.approx(0.5)


@pytest.mark.parametrize("count_noise", [0.0, 2.0])
def test_weight_and_count_noise_compose_to_the_multiplier(central, count_noise: float) -> None:
    private = central(noise=1.3, mode="adaptive", clipped_count_stddev=count_noise)
    wrapper = private.wrapper
    assert isinstance(wrapper, AdaptiveClipping)
    # 0 means max(sites / 20, noise multiplier)
    assert wrapper.clipped_count_stddev == (count_noise or 1.3)
    # both are Gaussian: the weights' sum changes by the clip norm, the count by 1/2
    together = math.hypot(1 / wrapper.noise_multiplier, 0.5 / wrapper.clipped_count_stddev)
    assert together == pytest.approx(1 / 1.3)


# Epsilon


def test_epsilon_matches_normal_distribution_tables() -> None:
    # one release with multiplier 1: delta(1) = P(Z < -1/2) - e P(Z < -3/2) = 0.30854 - e 0.06681
    assert delta_at(1.0, 1.0) == pytest.approx(0.12693, abs=1e-5)
    assert central_epsilon([1.0], 0.12693) == pytest.approx(1.0, abs=1e-4)
    assert central_epsilon([1.0], 0.39) == 0  # delta(0) = P(|Z| < 1/2) = 0.3829
    assert central_epsilon([2.0] * 4, 1e-5) == pytest.approx(central_epsilon([1.0], 1e-5))


HISTORIES = {
    "one": [1.0],
    "a run": [1.1] * 10,
    "little noise": [0.05] * 3,
    "much noise": [40.0] * 100,
    "several": [0.7, 0.9, 2.0, 5.0],
}


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_epsilon_is_exact_and_rounded_up(name: str, delta: float) -> None:
    mu = math.sqrt(sum(z**-2 for z in HISTORIES[name]))
    found = central_epsilon(HISTORIES[name], delta)
    assert delta_at(found, mu) <= delta * (1 + 1e-9)
    if found > 0:
        assert delta_at(found * (1 - 1e-6), mu) > delta
        assert PRECISION < 1e-6


@pytest.mark.parametrize("name", HISTORIES)
def test_epsilon_agrees_with_google_pld_accountant(name: str) -> None:
    pld = pytest.importorskip("dp_accounting.pld", reason="pip install dp-accounting")
    from dp_accounting import dp_event

    theirs = pld.PLDAccountant(value_discretization_interval=1e-3)
    for noise in HISTORIES[name]:
        theirs.compose(dp_event.GaussianDpEvent(noise))
    reference = theirs.get_epsilon(1e-5)  # an upper bound, too large by at most its grid
    found = central_epsilon(HISTORIES[name], 1e-5)
    assert found <= reference <= 1.02 * found + 2e-3 * len(HISTORIES[name])
    wrong = central_epsilon(HISTORIES[name][:-1] or [2.0], 1e-5)  # one release is missing
    assert wrong < 0.998 * found or name == "much noise"


@pytest.mark.parametrize("name", HISTORIES)
def test_epsilon_is_at_most_flower_rdp_accountant(name: str) -> None:
    pytest.importorskip("dp_accounting", reason="pip install dp-accounting")
    from flwr.supercore.privacy_accounting import (
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        SamplingMethod,
    )
    from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

    theirs = RdpAccountant(
        PrivacyConfig(
            1e-5, 3, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
        )
    )
    for noise in HISTORIES[name]:
        theirs.compose(GaussianPrivacyEvent(noise, 3, 3))
    found = central_epsilon(HISTORIES[name], 1e-5)
    assert found <= theirs.get_epsilon(1e-5) <= 1.6 * found + 0.1


def test_epsilon_at_extreme_noise_multipliers() -> None:
    assert central_epsilon([], 1e-5) == 0
    assert central_epsilon([1e6], 1e-5) == 0
    assert central_epsilon([1.0, 0.0], 1e-5) == math.inf
    assert central_epsilon([1e-200], 1e-5) == math.inf
    for mu in (1e4, 1e5, 1e7, 1e20):
        bound = mu**2 / 2 + mu * math.sqrt(2 * math.log(1e5))  # the RDP bound, always larger
        assert mu**2 / 2 <= central_epsilon([1 / mu], 1e-5) <= bound * (1 + 1e-12)
    with pytest.raises(ValueError, match="delta: expected a number between 0 and 1, got 1"):
        central_epsilon([1.0], 1.0)
    with pytest.raises(
        ValueError, match="noise multiplier: expected a number of at least 0, got -1"
    ):
        central_epsilon([-1.0], 0.1)


def test_noise_to_update_ratio_matches_the_documentation() -> None:
    """Checks the values in docs/privacy.md for 56.3 million weights and ten rounds."""
    weights = {"encoder/float32": np.broadcast_to(np.float32(0), (56_300_000,))}
    config = CentralConfig(mode="fixed", noise_multiplier=2.0)
    for sites, ratio in ((3, 5002), (100, 150), (15_000, 1.0)):
        assert noise_to_update(config, sites, weights) == pytest.approx(ratio, rel=0.01)
    assert central_epsilon([2.0] * 10, 1e-5) == pytest.approx(7.51, abs=0.01)
    for sites, epsilon in ((3, 3.13e7), (100, 2.92e4), (1000, 382)):
        as_long_as_the_update = sites / math.sqrt(56.3e6)
        found = central_epsilon([as_long_as_the_update] * 10, 1e-5)
        assert found == pytest.approx(epsilon, rel=0.01)


# Saved releases


def test_every_release_is_counted_and_saved(central) -> None:
    private = central(noise=1.5)
    for number in (1, 2, 3):
        private.average(number, [], ZERO)
        assert read_releases(private.path) == private.releases
        assert private.releases[-1].epsilon == central_epsilon([1.5] * number, 1e-5)
    assert [release.round for release in private.releases] == [1, 2, 3]
    assert private.state()["epsilon"] == private.releases[-1].epsilon


def test_resumed_run_keeps_releases_and_clip_norm(central) -> None:
    settings = {"mode": "adaptive", "noise_multiplier": 2.0}
    private = central(noise=2.0, mode="adaptive")
    for number in (1, 2):
        private.average(number, of_norms(3.0), ZERO)
    state = json.loads(json.dumps(private.state()))
    again = CentralPrivacy(
        CentralConfig(**settings), private.sites, private.path, state["clip-norm"]
    )
    assert again.clip_norm == private.clip_norm != 1.0
    again.average(3, of_norms(3.0), ZERO)
    assert again.releases[-1].epsilon == central_epsilon([2.0] * 3, 1e-5)
    assert len(read_releases(private.path)) == 3


def test_release_is_saved_before_the_average_is_returned(central, monkeypatch) -> None:
    def full(path: Path, releases: Sequence[CentralRelease]) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("polyclinic.server.aggregation.central_dp.write_releases", full)
    with pytest.raises(OSError, match="no space left"):
        central().average(1, [], ZERO)


def test_releases_round_trip_through_the_file(tmp_path: Path) -> None:
    releases = (
        CentralRelease(1, 3, 1.0, 0.5, 4.2, 1e-5),
        CentralRelease(2, 3, 1.0, 0.6, 6.1, 1e-5),
    )
    assert read_releases(tmp_path / "central.json") == ()
    write_releases(tmp_path / "central.json", releases)
    assert read_releases(tmp_path / "central.json") == releases


# Flower messages


def test_contribution_round_trips_through_a_message() -> None:
    one = update("site-1", [1.0, 2.0], [3.0], [4.0], counts=(7, 0, 3))
    again = contribution_of(message_of(one))
    assert (again.site, again.counts) == (one.site, one.counts)
    assert all(np.array_equal(again.weights[key], one.weights[key]) for key in one.weights)


def test_flower_strategy_can_extend_average_by_task() -> None:
    class AdamByTask(FedAdam, AverageByTask):
        pass

    strategy = AdamByTask(eta=0.5, beta_1=0.0, beta_2=0.0, tau=1.0)
    assert strategy.configure_train(0, record_of(ZERO), ConfigRecord(), None) == []
    sites = [
        update("a", [1.0], [9.0], [0.0], counts=(3, 0, 1)),
        update("b", [5.0], [2.0], [0.0], counts=(1, 1, 1)),
    ]
    arrays, _ = strategy.aggregate_train(0, [message_of(c) for c in sites])
    # the encoder's mean by examples is 2; only b has masks; a step is eta * d / (|d| + tau)
    assert values(packed_of(arrays)) == pytest.approx([0.5 * 2 / 3, 0.5 * 2 / 3, 0.0])


# Settings


def config_of(**settings: object) -> RunConfig:
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    return RunConfig.from_flat({"central.mode": "fixed", **named})


def test_settings_that_break_the_privacy_bound_are_refused() -> None:
    assert config_of().central.noise_multiplier == 1.0
    for settings, said in (
        ({"model__norm": "batch"}, r"model.norm: expected group with central.mode fixed.*batch"),
        ({"central__noise_multiplier": 0.0}, r"central.noise-multiplier .*greater than 0"),
        ({"central__clip_norm": 0.0}, r"central.clip-norm .*greater than 0"),
        ({"central__delta": 1.0}, r"central.delta .*less than 1"),
        ({"central__mode": "local"}, r"central.mode .*'adaptive', got 'local'"),
        ({"central__target_clipped_quantile": 1.5}, r"central.target-clipped-quantile .*at most 1"),
        (
            {"central__mode": "adaptive", "central__clipped_count_stddev": 0.5},
            r"central.clipped-count-stddev: expected 0, or more than half of .*\(1\), got 0.5",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            config_of(**settings)
    assert RunConfig.from_flat({"model.norm": "batch"}).central.mode == "off"


# A whole federation


CENTRAL = {"central__mode": "fixed", "central__delta": 1e-3, "train__local_steps": 2}


def contributions_of(federation) -> list[Contribution]:
    """Record the contributions of the sites as the server reads them, during a run."""
    kept: list[Contribution] = []

    def keep(partition: int, reply: Message) -> Message:
        if trained(reply):
            sums = reply.content.metric_records[wire.SUMS]
            counts = [sums[key] for key in (wire.EXAMPLES, wire.WITH_MASK, wire.WITH_LABEL)]
            weights = packed_of(reply.content.array_records[wire.WEIGHTS])
            kept.append(
                Contribution(
                    f"site-{partition + 1}", weights, dict(zip(GROUPS, counts, strict=True))
                )
            )
        return reply

    federation.tamper = keep
    return kept


def weights_of(folder, config: RunConfig, number: int) -> Packed:
    return Layout.of(network(config)).pack(load_file(folder.checkpoint(number)))


def first_weights(config: RunConfig) -> Packed:
    fresh = network(config)
    return Layout.of(fresh).pack(fresh.state_dict())


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_run_with_central_privacy_records_epsilon_everywhere(tiny, grid, mode: str) -> None:
    config = tiny(**{**CENTRAL, "central__mode": mode})
    folder = run(grid(config), config)
    lines = read_history(folder.history)
    told = [line.central for line in lines if line.central]
    assert {line.site for line in lines if line.central} == {POOLED}
    assert [release.epsilon for release in told] == [
        central_epsilon([1.0] * number, 1e-3) for number in (1, 2)
    ]
    assert list(read_releases(folder.central)) == told
    assert {(release.sites, release.delta) for release in told} == {(3, 1e-3)}
    state = json.loads(folder.state(2).read_text())["central"]
    assert (state["releases"], state["epsilon"]) == (2, told[-1].epsilon)
    assert (told[0].clip_norm == told[1].clip_norm == state["clip-norm"]) == (mode == "fixed")
    events = [json.loads(text) for text in folder.progress.read_text().splitlines()]
    rounds = [event["central"]["epsilon"] for event in events if event["event"] == "round"]
    assert rounds == [release.epsilon for release in told]
    assert not any(line.train.epsilon for line in lines if line.train)  # local privacy is off


def test_run_with_little_noise_averages_sites_equally_by_task(tiny, grid) -> None:
    settings = {"central__noise_multiplier": 1e-9, "central__clip_norm": 1e3}
    config = tiny(**CENTRAL, **settings, rounds__count=1, phantom__without_masks="site-1")
    federation = grid(config)
    sent = contributions_of(federation)
    folder = run(federation, config)
    alike = [
        Contribution(c.site, c.weights, {group: min(1, n) for group, n in c.counts.items()})
        for c in sent
    ]
    expected = average_by_task(alike, first_weights(config))
    for key, array in weights_of(folder, config, 1).items():
        np.testing.assert_allclose(array, expected[key], rtol=1e-4, atol=1e-5)


def test_lost_site_stays_in_the_denominator(tiny, grid) -> None:
    settings = {"central__noise_multiplier": 1e-9, "central__clip_norm": 1e3}
    rounds = {"rounds__count": 1, "rounds__min_sites": "2", "rounds__deadline_s": 2}
    config = tiny(**CENTRAL, **settings, **rounds)
    federation = grid(config)
    sent = contributions_of(federation)
    keep = federation.tamper
    federation.tamper = lambda partition, reply: (
        None if partition == 1 and trained(reply) else keep(partition, reply)
    )
    folder = run(federation, config)
    before, after = first_weights(config), weights_of(folder, config, 1)
    assert [c.site for c in sent] == ["site-1", "site-3"]
    for key in before:
        moved = sum((c.weights[key].astype(np.float64) - before[key] for c in sent), 0.0) / 3
        np.testing.assert_allclose(after[key] - before[key], moved, rtol=1e-3, atol=1e-5)
    assert read_releases(folder.central)[0].sites == 3


def test_saved_and_evaluated_weights_contain_noise(tiny, grid) -> None:
    config = tiny(**CENTRAL, rounds__count=1)
    federation = grid(config)
    sent = contributions_of(federation)
    folder = run(federation, config)
    saved = weights_of(folder, config, 1)
    evaluated = federation.sent[-1].content.array_records[wire.WEIGHTS]
    assert all(np.array_equal(evaluated[key].numpy(), saved[key]) for key in saved)
    plain = average_by_task(sent, first_weights(config))
    noise = np.concatenate([saved[key] - plain[key] for key in saved])
    assert noise.std() == pytest.approx(1 / 3, rel=0.05)


def test_round_failing_after_its_release_is_counted(tiny, grid) -> None:
    config = tiny(**CENTRAL, rounds__deadline_s=2)
    federation = grid(config)
    evaluations = 0

    def vanish(partition: int, reply: Message) -> Message | None:
        nonlocal evaluations
        evaluations += reply.metadata.message_type == wire.EVALUATE
        return None if evaluations > 3 and partition == 0 else reply

    federation.tamper = vanish
    with pytest.raises(RunFailed, match="round 2, evaluate"):
        run(federation, config)
    folder = Path(config.run.output_dir) / config.run.name
    assert not (folder / "checkpoints" / "state-0002.json").exists()
    assert [release.round for release in read_releases(folder / "central.json")] == [1, 2]


def test_central_privacy_off_changes_nothing(tiny, grid) -> None:
    config = tiny(rounds__count=1)
    federation = grid(config)
    sent = contributions_of(federation)
    np.random.seed(0)
    folder = run(federation, config)
    expected = average_by_task(sent, first_weights(config))
    for key, array in weights_of(folder, config, 1).items():
        assert np.array_equal(array, expected[key])
    assert not folder.central.exists()
    assert "central" not in json.loads(folder.state(1).read_text())
    assert {line.central for line in read_history(folder.history)} == {None}


# Texts


def test_central_and_local_epsilon_have_distinct_texts() -> None:
    release = CentralRelease(2, 3, 1.0, 1.0, 4.618, 1e-5)
    assert central_text(release) == "central epsilon (site): 4.62, delta 1e-05"
    spent = spent_text({"site-1": 1.234}, "patient")
    assert spent == "epsilon spent (patient): site-1 1.23"


def test_model_card_separates_local_and_central_privacy(tiny, grid, cli) -> None:
    own = {
        "privacy__mode": "dp-sgd",
        "privacy__noise_multiplier": 1.0,
        "privacy__delta": 1e-3,
        "loss__class_weights": "none",
        "data__split": "independent",
        "phantom__examples": 40,
    }
    config = tiny(**CENTRAL, **own)
    folder = run(grid(config), config)
    both = _privacy(config, folder, 2)
    last = read_releases(folder.central)[-1]
    sites = {line.site: line.train for line in read_history(folder.history) if line.train}
    assert "| site | epsilon (patient) | delta |" in both
    assert f"| site-1 | {sites['site-1'].epsilon:.2f} | 0.001 |" in both
    assert "| averages | sites | noise multiplier | central epsilon (site) | delta |" in both
    assert f"| 2 | 3 | 1 | {last.epsilon:.2f} | 0.001 |" in both
    assert "not against the server" in both
    assert "No differential privacy" not in both
    assert "noise on the average" in _procedure(config, 2)
    status, shown, _ = cli("runs", "show", folder.path)
    assert status == 0
    assert "epsilon spent (patient): site-1" in shown
    assert f"central epsilon (site): {last.epsilon:.2f}, delta 0.001" in shown
    followed = StringIO()
    display = Display(config, Console(file=followed, width=500))
    for text in folder.progress.read_text().splitlines():
        display.follow(json.loads(text))
    assert "; epsilon spent (patient): site-1" in followed.getvalue()
    assert f"; central epsilon (site): {last.epsilon:.2f}, delta 0.001" in followed.getvalue()
    without = RunConfig.from_flat({**config.to_flat(), "privacy.mode": "off"})
    alone = _privacy(without, folder, 2)
    assert "all **without noise**" in alone
    assert "central epsilon (site)" in alone
    assert "epsilon (patient)" not in alone
    assert "No differential privacy" not in alone
    none = _privacy(RunConfig.from_flat({**without.to_flat(), "central.mode": "off"}), folder, 2)
    assert "No differential privacy was used" in none
    assert "central" not in none


def test_sites_by_group_counts_sites_with_training_annotations() -> None:
    class Report:
        def __init__(self, masks: int, labels: int) -> None:
            self.with_mask = {wire.TRAIN_SPLIT: masks, wire.VAL_SPLIT: 9}
            self.with_label = {wire.TRAIN_SPLIT: labels, wire.VAL_SPLIT: 9}

    found: dict[Group, int] = sites_by_group({"a": Report(0, 3), "b": Report(2, 1)})
    assert found == {"encoder": 2, "segmentation": 1, "classification": 2}
