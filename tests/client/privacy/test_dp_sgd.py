"""DP-SGD: sensitivity to one unit, noise, adaptive clipping, and the settings it refuses."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor, nn

from polyclinic.client.data.dataset import Examples
from polyclinic.client.privacy.dp_sgd import (
    Adaptation,
    ClipNorm,
    Mechanism,
    NoisyGradient,
    microbatches,
    sampling,
    train_one_round_privately,
    units_of,
)
from polyclinic.client.privacy.unit_gradients import units_of_network
from polyclinic.client.training.local_round import Round, TrainingError, train_one_round
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.network import MultiTaskUNet
from tests.factories import CPU, DATA, changed_parts, same, small, some

LOSS = LossConfig(class_weights="none")
QUIET = Mechanism(noise_multiplier=0.0, sample_rate=0.5, steps=2, units=12, clip_norm=1.0)
LOUD = replace(QUIET, noise_multiplier=1.0)


def trained(
    examples: Examples,
    mechanism: Mechanism = LOUD,
    unit: str = "patient",
    physical: int = 4,
    random: int | None = 0,
    **train: object,
) -> MultiTaskUNet:
    model = small(size=(32, 32))
    train_one_round_privately(
        model,
        examples,
        Round(1, 2, 0, "a"),
        mechanism=mechanism,
        data=DATA,
        train=TrainConfig(augment=False, **train),
        loss=LOSS,
        privacy=PrivacyConfig(mode="dp-sgd", unit=unit, physical_batch_size=physical),
        device=CPU,
        random=None if random is None else np.random.default_rng(random),
    )
    return model


class Linear(nn.Module):
    """The smallest network for which Opacus computes per-example gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def gradients_of(
    xs: list[Tensor],
    mechanism: Mechanism = QUIET,
    physical: int = 100,
    random: int = 0,
    kind: str = "ghost",
) -> list[Tensor]:
    """Compute the released gradient of one step; each entry of ``xs`` holds one unit's rows."""
    torch.manual_seed(0)
    network = Linear()
    parameters = list(network.parameters())
    generator = np.random.default_rng(random)
    gradient = NoisyGradient(parameters, mechanism.expected_units, generator)
    clipping = ClipNorm(mechanism, generator)
    ends = np.cumsum([0, *map(len, xs)])
    positions = [np.arange(*span) for span in pairwise(ends)]
    rows = torch.cat([torch.empty(0, 3), *xs])
    with units_of_network(kind, network, parameters) as units:
        for microbatch in microbatches(positions, physical):
            for chunk in microbatch:
                loss = units.forward(rows[chunk.positions]).square().sum()
                units.backward(
                    loss, torch.from_numpy(chunk.unit), unit_continues=len(microbatch) > 1
                )
            units.clip(clipping.norm, gradient.sums)
    gradient.release(clipping.deviation)
    return [p.grad for p in network.parameters()]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the distance of two gradient sums, undoing the released mean."""
    return (
        QUIET.expected_units
        * torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)]).norm().item()
    )


@pytest.mark.parametrize("kind", ["ghost", "hooks"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("physical", [2, 100])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_one_unit_changes_the_sum_by_at_most_the_clip_norm(
    rows: int, physical: int, size: float, kind: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    others = [torch.randn(n, 3, generator=generator) for n in (1, 3, 2, 1)]
    one = size * torch.randn(rows, 3, generator=generator)
    for at in range(len(others) + 1):
        more = [*others[:at], one, *others[at:]]
        found = gradients_of(more, physical=physical, kind=kind)
        change = distance(found, gradients_of(others, kind=kind))
        assert change < QUIET.clip_norm * (1 + 1e-4)
    if size > 1:
        assert change > 0.99 * QUIET.clip_norm


def test_clipping_by_example_does_not_bound_a_patient() -> None:
    """Negative control: the same images, each as a unit of its own."""
    one = 1e3 * torch.randn(1, 3).expand(5, 3)
    as_patient = distance(gradients_of([one]), gradients_of([]))
    as_examples = distance(gradients_of(list(one[:, None])), gradients_of([]))
    assert as_patient < 1.001 * QUIET.clip_norm
    assert as_examples > 4.99 * QUIET.clip_norm


@pytest.mark.parametrize("physical", [1, 2, 3, 100])
def test_gradient_does_not_depend_on_physical_batch_size(physical: int) -> None:
    xs = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 3, 2, 5, 1)]
    for found, expected in zip(gradients_of(xs, physical=physical), gradients_of(xs), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradient_with_example_units_matches_opacus() -> None:
    xs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = GradSampleModule(Linear(), loss_reduction="sum")
    theirs = DPOptimizer(
        torch.optim.SGD(network.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=QUIET.clip_norm,
        expected_batch_size=6,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        network(xs).square().sum().backward()
    theirs.pre_step()
    for ours, parameter in zip(gradients_of(list(xs[:, None])), network.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


@pytest.mark.parametrize("kind", ["ghost", "hooks"])
def test_non_finite_gradient_of_a_unit_is_dropped(kind: str) -> None:
    xs = [torch.randn(2, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    broken = [*xs, torch.full((2, 3), torch.inf)]
    for found, expected in zip(gradients_of(broken, kind=kind), gradients_of(xs), strict=True):
        torch.testing.assert_close(found, expected)


def noise_p_value(mechanism: Mechanism, claimed: float) -> float:
    """Return the two-sided p-value of the noise under the claimed standard deviation."""
    steps = 400
    noise = np.concatenate(
        [
            np.concatenate([g.flatten() for g in gradients_of([], mechanism, random=k)])
            for k in range(steps)
        ]
    )
    squares = ((noise * mechanism.expected_units / claimed) ** 2).sum()
    below = stats.chi2.cdf(squares, len(noise))
    return 2 * min(below, 1 - below)


@pytest.mark.parametrize(("sigma", "clip"), [(1.0, 1.0), (0.7, 3.0)])
def test_noise_deviation_matches_the_accounted_one(sigma: float, clip: float) -> None:
    mechanism = replace(QUIET, noise_multiplier=sigma, clip_norm=clip)
    assert noise_p_value(mechanism, sigma * clip) > 1e-3
    for wrong in (2 / 3, 3 / 2):  # negative controls
        assert noise_p_value(mechanism, wrong * sigma * clip) < 1e-9


def test_training_draws_independent_noise_at_every_step() -> None:
    """A whole round at a sampling rate near 0: only noise moves the weights."""
    seen: list[Tensor] = []

    class Watching(NoisyGradient):
        def release(self, deviation: float) -> None:
            super().release(deviation)
            seen.append(torch.cat([p.grad.flatten() for p in self.sums]))

    mechanism = replace(LOUD, sample_rate=1e-12, units=10**12, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyclinic.client.privacy.dp_sgd.NoisyGradient", Watching)
        trained(some(), mechanism)
    assert len(seen) == 3
    for noise in seen:
        assert noise.std().item() == pytest.approx(1.0, rel=0.01)
        assert abs(noise.mean().item()) < 0.01
    assert abs(torch.corrcoef(torch.stack(seen[:2]))[0, 1].item()) < 0.01


FOLLOWS = Adaptation(quantile=0.5, rate=0.2)


def test_adaptive_clip_norm_converges_to_the_quantile() -> None:
    generator = np.random.default_rng(0)
    clipping = ClipNorm(Mechanism(1.0, 0.5, 1, 400, 100.0, FOLLOWS), generator)
    for _ in range(150):
        clipping.move(torch.from_numpy(generator.lognormal(1.0, 0.5, 200)))
    assert clipping.norm == pytest.approx(np.e, rel=0.15)  # the median
    fixed = ClipNorm(Mechanism(1.0, 0.5, 1, 400, 100.0), generator)
    fixed.move(torch.zeros(200))
    assert (fixed.norm, fixed.noise_multiplier) == (100.0, 1.0)


@pytest.mark.parametrize(("noise", "units"), [(0.5, 4), (1.0, 40), (3.0, 1000)])
def test_gradient_and_count_noise_compose_to_the_accounted_noise(noise: float, units: int) -> None:
    clipping = ClipNorm(Mechanism(noise, 0.5, 1, 2 * units, 7.0, FOLLOWS), np.random.default_rng(0))
    # one unit moves the gradient by the clip norm and the count by 1/2, here in noise deviations
    moved = (7.0 / clipping.deviation) ** 2 + (0.5 / clipping.count_deviation) ** 2
    assert moved**-0.5 == pytest.approx(noise)
    assert clipping.noise_multiplier > noise


def test_one_unit_changes_the_clip_count_by_one_half() -> None:
    def count(norms: list[float]) -> float:
        clipping = ClipNorm(Mechanism(0.0, 1.0, 1, 10, 1.0, FOLLOWS), np.random.default_rng(0))
        clipping.count_deviation = 0.0
        clipping.move(torch.tensor(norms))
        return 10 * (FOLLOWS.quantile - np.log(clipping.norm) / FOLLOWS.rate)

    for more in (0.1, 10.0, float("nan"), float("inf")):
        assert abs(count([0.5, 2.0, more]) - count([0.5, 2.0])) == pytest.approx(0.5, abs=1e-5)


def test_adaptive_clipping_changes_the_trained_weights() -> None:
    adapting = replace(LOUD, adapts=FOLLOWS, steps=3)
    assert not same(trained(some(), adapting), trained(some(), replace(LOUD, steps=3)))


def test_step_without_sampled_units_applies_noise() -> None:
    model = trained(some(), replace(LOUD, sample_rate=1e-12, units=10**12, steps=1))
    assert changed_parts(model) == {"encoder", "dfe", "decoder", "head"}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("unit", ["example", "patient"])
def test_training_without_noise_or_clipping_matches_plain_training(unit: str) -> None:
    """With every unit in one step, the gradient differs from the plain one only in its scale."""
    examples = some()
    everything = Mechanism(0.0, 1.0, 1, len(units_of(examples, unit)), clip_norm=1e9)
    private = trained(examples, everything, unit, physical=5)
    plain = small(size=(32, 32))
    train_one_round(
        plain,
        examples,
        Round(1, 2, 0, "a"),
        data=DATA,
        train=TrainConfig(augment=False, batch_size=len(examples), local_steps=1, clip_norm=0.0),
        loss=LOSS,
        device=CPU,
    )
    close = [
        torch.isclose(a, b, atol=2e-4).float().mean().item()  # Adam's first step is about 1e-3
        for a, b in zip(private.state_dict().values(), plain.state_dict().values(), strict=True)
    ]
    assert np.mean(close) > 0.99


def test_trained_weights_do_not_depend_on_physical_batch_size() -> None:
    small_, large = trained(some(), physical=3), trained(some(), physical=100)
    for a, b in zip(small_.state_dict().values(), large.state_dict().values(), strict=True):
        assert torch.isclose(a, b, atol=1e-4).float().mean() > 0.99


def test_noise_does_not_depend_on_the_run_seed() -> None:
    """The server knows the run's seed; two rounds with the same one must differ."""
    assert same(trained(some(), random=3), trained(some(), random=3))
    assert not same(trained(some(), random=None), trained(some(), random=None))


def test_unannotated_task_parts_stay_unchanged() -> None:
    assert changed_parts(trained(some(masks=False))) == {"encoder", "head"}
    assert changed_parts(trained(some(labels=False))) == {"encoder", "dfe", "decoder"}
    with pytest.raises(TrainingError, match="none of the training examples"):
        trained(some(masks=False, labels=False))


def test_private_training_leaves_no_hooks_on_the_network() -> None:
    model = trained(some(masks=False))
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert not hasattr(parameter, "grad_sample")
        assert parameter.grad is None
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_units_of_groups_by_example_or_patient() -> None:
    examples = some(7)
    assert [u.tolist() for u in units_of(examples, "example")] == [[i] for i in range(7)]
    assert sorted(u.tolist() for u in units_of(examples, "patient")) == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6],
    ]


def test_microbatches_keep_units_whole_and_cut_only_large_ones() -> None:
    units = [np.arange(a, b) for a, b in ((0, 2), (2, 4), (4, 9), (9, 10))]
    found = list(microbatches(units, 3))
    assert [[chunk.positions.tolist() for chunk in microbatch] for microbatch in found] == [
        [[0, 1]],
        [[4, 5, 6], [7, 8]],
        [[2, 3, 9]],
    ]
    assert found[-1][0].unit.tolist() == [0, 0, 1]
    assert list(microbatches([], 3)) == []


def test_sampling_rate_and_steps_follow_from_declared_size() -> None:
    assert sampling(TrainConfig(batch_size=8, local_epochs=2), 100) == (0.08, 26)
    assert sampling(TrainConfig(batch_size=8, local_steps=5), 100) == (0.08, 5)
    assert sampling(TrainConfig(batch_size=8), 4) == (1.0, 1)


def private(**settings: object) -> RunConfig:
    base = {
        "privacy.mode": "dp-sgd",
        "privacy.target-epsilon": 3.0,
        "loss.class-weights": "none",
        "data.split": "independent",
    }
    named = {key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()}
    return RunConfig.from_flat({**base, **named})


def test_settings_that_break_the_privacy_bound_are_refused() -> None:
    assert private().privacy.unit == "patient"
    for settings, said in (
        ({"data__split": "stratified"}, r"data.split: expected independent"),
        ({"model__norm": "batch"}, r"model.norm: expected group .*; got batch"),
        ({"train__grad_checkpointing": True}, r"train.grad-checkpointing: expected false"),
        ({"train__compile": True}, r"train.compile: expected false"),
        ({"loss__class_weights": "balanced"}, r"loss.class-weights: expected none, or one number"),
        ({"privacy__target_epsilon": 0.0}, r"one of target-epsilon and noise-multiplier.*0 and 0"),
        ({"privacy__noise_multiplier": 1.0}, r"one of target-epsilon and .* got 3 and 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            private(**settings)


def test_apps_import_does_not_load_opacus() -> None:
    code = "import apps, sys; sys.exit('opacus' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
