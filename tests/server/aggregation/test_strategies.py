"""Each strategy on a small case computed by hand from its paper."""

from __future__ import annotations

import numpy as np
import pytest

from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.strategy import ROBUST, SERVER_OPTIMISERS, StrategyConfig
from polyclinic.mtl_model.packing import Packed
from polyclinic.server.aggregation.averaging import Contribution, RunningAverage, average_by_task
from polyclinic.server.aggregation.strategies import combination_of, optimiser_of
from polyclinic.server.runs.history import POOLED, read_history

ENCODER, DECODER, HEAD = "encoder/float32", "segmentation/float32", "classification/float32"

pytestmark = pytest.mark.usefixtures("flower_identity")


def weights(encoder: float, decoder: float = 0.0, head: float = 0.0) -> Packed:
    values = {ENCODER: encoder, DECODER: decoder, HEAD: head}
    return {key: np.array([value, -value], np.float32) for key, value in values.items()}


def site(name: str, trained: Packed, examples: int = 1, masks: int = 1, labels: int = 1):
    counts = {"encoder": examples, "segmentation": masks, "classification": labels}
    return Contribution(name, trained, counts)


def combined(name: str, contributions: list[Contribution], **settings: float) -> Packed:
    strategy = StrategyConfig(name=name, **settings)
    combination = combination_of(strategy, weights(0.0))
    for contribution in contributions:
        combination.add(contribution)
    return combination.combined()


def test_average_does_not_depend_on_arrival_order() -> None:
    rng = np.random.default_rng(0)
    current = {ENCODER: np.zeros(10_000, np.float32)}
    contributions = [
        site(
            f"site-{i}",
            {ENCODER: (rng.normal(size=10_000) * 10.0 ** rng.integers(-9, 9)).astype(np.float32)},
            examples=int(rng.integers(1, 100_000)),
        )
        for i in range(7)
    ]
    first = average_by_task(contributions, current)[ENCODER]
    for _ in range(10):
        rng.shuffle(contributions)
        assert np.array_equal(average_by_task(contributions, current)[ENCODER], first)
    # against the exact sum, rounded once
    from fractions import Fraction

    total = sum(c.counts["encoder"] for c in contributions)
    for i in (0, 17, 9_999):
        exact = sum(
            Fraction(float(c.weights[ENCODER][i])) * c.counts["encoder"] for c in contributions
        )
        assert first[i] == np.float32(float(exact / total))


def test_plain_sum_depends_on_order() -> None:
    """Negative control: summing in float64 depends on the order."""
    values = np.array([1e16, 1.0, -1e16])
    assert (values[0] + values[1]) + values[2] != (values[0] + values[2]) + values[1]


def test_running_average_keeps_no_reference_to_added_weights() -> None:
    average = RunningAverage(weights(0.0))
    trained = weights(3.0)
    average.add(site("a", trained))
    trained[ENCODER][:] = 99.0
    assert average.combined()[ENCODER].tolist() == [3.0, -3.0]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("fedavg", {}, 21.9),  # (1 + 2 + 3 + 3.5 + 100) / 5
        ("fedmedian", {}, 3.0),  # Yin et al., 2018
        ("trimmed-mean", {"trim_fraction": 0.2}, 8.5 / 3),  # (2 + 3 + 3.5) / 3
        # scores by the n - f - 2 = 2 nearest: 5, 2, 1.25, 2.5, large (Blanchard et al., 2017)
        ("krum", {"malicious_sites": 1}, 3.0),
        ("multi-krum", {"malicious_sites": 1}, 2.375),  # 1, 2, 3, 3.5
        ("multi-krum", {"malicious_sites": 1, "krum_sites": 2}, 2.5),  # 2, 3
    ],
)
def test_combination_with_one_outlier_by_hand(name: str, settings: dict, expected: float) -> None:
    values = [1.0, 2.0, 3.0, 3.5, 100.0]
    contributions = [site(f"site-{v:g}", weights(v, v, v)) for v in values]
    result = combined(name, contributions[::-1], **settings)
    for key in (ENCODER, DECODER, HEAD):
        assert result[key].tolist() == pytest.approx([expected, -expected])
        assert result[key].dtype == np.float32


@pytest.mark.parametrize("name", ["fedmedian", "trimmed-mean", "krum", "multi-krum"])
def test_robust_strategies_use_only_sites_that_trained_the_task(name: str) -> None:
    """Sites without masks leave the decoder unchanged and must not outvote the others."""
    settings = {"malicious_sites": 0, "trim_fraction": 0.0}
    with_masks = [site(f"mask-{i}", weights(1.0, 5.0)) for i in range(2)]
    without = [site(f"none-{i}", weights(1.0, 0.0), masks=0) for i in range(5)]
    result = combined(name, [*with_masks, *without], **settings)
    assert result[DECODER].tolist() == [5.0, -5.0]
    nobody = combined(name, without, **settings)
    assert nobody[DECODER].tolist() == [0.0, 0.0]


def test_krum_separates_close_updates_of_large_weights() -> None:
    """Flower computes distances from squared weights, which loses them in float32."""
    current = {ENCODER: np.full(1000, 100.0, np.float32)}
    steps = [0.001, 0.0011, 0.0012, 0.05]
    strategy = StrategyConfig(name="krum", malicious_sites=1)
    combination = combination_of(strategy, current)
    for i, step in enumerate(steps):
        moved = {ENCODER: current[ENCODER] + np.float32(step)}
        combination.add(site(f"site-{i}", moved))
    assert combination.combined()[ENCODER][0] == pytest.approx(100.0011, abs=2e-4)


@pytest.mark.parametrize("name", ["fedmedian", "krum"])
def test_integers_come_from_the_largest_site(name: str) -> None:
    key = "encoder/int64"
    combination = combination_of(StrategyConfig(name=name), {key: np.array([0])})
    for i, examples in enumerate((5, 9, 2)):
        combination.add(site(f"site-{i}", {key: np.array([i])}, examples=examples))
    result = combination.combined()
    assert result[key].tolist() == [1]
    assert result[key].dtype == np.int64


def steps_of(name: str, averages: list[float], **settings: float) -> list[float]:
    """Return the path of one weight, starting at 0, for given average changes per round."""
    optimiser = optimiser_of(StrategyConfig(name=name, **settings))
    assert optimiser is not None
    sent, path = {ENCODER: np.zeros(1, np.float32)}, []
    for number, delta in enumerate(averages, 1):
        average = {ENCODER: sent[ENCODER] + np.float32(delta)}
        sent = optimiser.step(number, sent, average)
        assert sent[ENCODER].dtype == np.float32
        path.append(float(sent[ENCODER][0]))
    return path


def test_fedavgm_by_hand() -> None:
    """Hsu et al., 2019: v = beta v + delta, w = w + eta v."""
    path = steps_of("fedavgm", [1.0, 2.0, -1.0], server_learning_rate=0.5, server_momentum=0.9)
    # v: 1, 2.9, 1.61
    assert path == pytest.approx([0.5, 1.95, 2.755])


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi", "fedadam"])
def test_adaptive_strategies_by_hand(name: str) -> None:
    """Reddi et al., 2021, algorithm 2, with zero initial moments as in Flower.

    Flower's FedAdam also corrects their bias, as Kingma and Ba do, with the round number plus one.
    """
    eta, tau, b1, b2 = 0.1, 0.01, 0.9, 0.99
    settings = {"server_learning_rate": eta, "tau": tau}
    if name != "fedadagrad":
        settings |= {"beta_1": b1, "beta_2": b2}
    else:
        b1 = 0.0
    deltas, m, v, w, expected = [1.0, -0.5, 0.25], 0.0, 0.0, 0.0, []
    for number, delta in enumerate(deltas, 1):
        m = b1 * m + (1 - b1) * delta
        if name == "fedadagrad":
            v += delta**2
        elif name == "fedyogi":
            v -= (1 - b2) * delta**2 * np.sign(v - delta**2)
        else:
            v = b2 * v + (1 - b2) * delta**2
        rate = eta
        if name == "fedadam":
            rate *= np.sqrt(1 - b2 ** (number + 1)) / (1 - b1 ** (number + 1))
        w += rate * m / (np.sqrt(v) + tau)
        expected.append(w)
    assert steps_of(name, deltas, **settings) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_restored_optimiser_continues_bitwise(name: str) -> None:
    rng = np.random.default_rng(1)
    strategy = StrategyConfig(name=name)
    whole, before = optimiser_of(strategy), optimiser_of(strategy)
    sent = {ENCODER: rng.normal(size=50).astype(np.float32), "encoder/int64": np.array([3])}

    def average_of(sent: Packed, number: int) -> Packed:
        noise = np.random.default_rng(number).normal(size=50).astype(np.float32)
        return {ENCODER: sent[ENCODER] + noise, "encoder/int64": np.array([number])}

    uninterrupted = sent
    for number in (1, 2, 3, 4):
        uninterrupted = whole.step(number, uninterrupted, average_of(uninterrupted, number))
    for number in (1, 2):
        sent = before.step(number, sent, average_of(sent, number))
    after = optimiser_of(strategy)
    after.restore({key: array.copy() for key, array in before.state().items()})
    for number in (3, 4):
        sent = after.step(number, sent, average_of(sent, number))
    assert np.array_equal(sent[ENCODER], uninterrupted[ENCODER])
    assert sent["encoder/int64"].tolist() == [4]


RATES = {"fedadam": 0.003, "fedyogi": 0.003, "fedadagrad": 0.01, "fedavgm": 1.0}


IN_CI = ("fedprox", "fedadam", "multi-krum")


@pytest.mark.parametrize(
    "name",
    [
        *IN_CI,
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in (*SERVER_OPTIMISERS, *ROBUST)
            if name not in IN_CI
        ),
    ],
)
def test_every_strategy_trains_the_phantom(tiny, grid, name: str) -> None:
    from polyclinic.server.app import run

    config: RunConfig = tiny(
        strategy__name=name,
        strategy__server_learning_rate=RATES.get(name, 0.0),
        strategy__server_momentum=0.3,
        strategy__malicious_sites=0,
        rounds__count=3,
        train__local_steps=12,
        train__learning_rate=0.003,
        train__augment=False,
    )
    folder = run(grid(config), config)
    losses = {
        number: [
            line.train.loss_segmentation
            for line in read_history(folder.history)
            if line.round == number and line.train
        ]
        for number in (1, 3)
    }
    assert all(len(of_sites) == 3 for of_sites in losses.values())
    assert np.mean(losses[3]) < np.mean(losses[1]) - 0.02
    pooled = [line for line in read_history(folder.history) if line.site == POOLED]
    assert pooled[-1].metrics.dice > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy.name": "fedadam", "model.norm": "batch"}, "expected group with strategy.name"),
        ({"strategy.name": "krum", "central.mode": "fixed"}, "expected none of fedmedian"),
        ({"rounds.fraction": 0.5, "central.mode": "fixed"}, "rounds.fraction: expected 1"),
    ],
)
def test_incompatible_settings_are_refused(settings: dict, said: str) -> None:
    from polyclinic.configs.errors import ConfigError

    with pytest.raises(ConfigError, match=said):
        RunConfig.from_flat(settings)


def test_personal_batch_norm_allows_a_server_optimiser() -> None:
    flat = {"strategy.name": "fedadam", "model.norm": "batch", "strategy.personal": "norms"}
    assert RunConfig.from_flat(flat).strategy.personal == "norms"
