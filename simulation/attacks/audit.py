"""Privacy audit: an empirical lower bound of epsilon for a private training round.

The audit follows Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS
2023, arXiv 2305.08846). Each of many canaries is included in a round or left out by a fair coin.
An attacker observes the round and guesses the coins for which it is most certain. If the round is
private with some epsilon, the share of correct guesses rarely exceeds
e^epsilon / (1 + e^epsilon), so a high share gives a lower bound of epsilon. ``accounting.epsilon``
gives an upper bound. A lower bound above the upper bound shows that the mechanism, the accounting
or the audit is wrong.

The audited round is ``train_one_round_privately``, as sites run it. The attacker is as strong as
the guarantee in docs/privacy.md allows: it knows the weights, the settings and every canary, and
sees the noisy gradient of each step, which is more than leaves a site. Canaries are designed to be
distinguishable, and the learning rate is so small that their gradients do not change during the
round. The lower bound is still far below the accounted epsilon, because all coins are guessed from
a single round. The audit therefore detects errors by a factor, not small errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table
from scipy.linalg import hadamard
from scipy.special import expit
from scipy.stats import binom
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import default_collate

from polyclinic.client.data.dataset import ExampleDataset, Examples, to_batch
from polyclinic.client.privacy import accounting
from polyclinic.client.privacy.dp_sgd import (
    Mechanism,
    train_one_round_privately,
    units_of,
)
from polyclinic.client.training.local_round import Round
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.output import messages, print_json, print_table
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.decoder import Decoder
from polyclinic.mtl_model.encoder import ResFormer
from polyclinic.mtl_model.head import MultiScaleHead
from polyclinic.mtl_model.losses import multi_task_loss
from polyclinic.mtl_model.network import MultiTaskUNet, build_model
from polyclinic.mtl_model.tasks import group_of

DELTA = 1e-5
CONFIDENCE = 0.95
SIDE = 32  # side of the canaries in pixels
CLIP_NORM = 1.0
PASS = 64  # physical batch size, in images

# Shares of the coins that are guessed. Several shares are tried, each at an equal part of the error
# probability (Bonferroni correction), so that the best bound may be reported.
SHARES = (0.1, 0.4, 1.0)

DATA = DataConfig(image_height=SIDE, image_width=SIDE)
LOSS = LossConfig(class_weights="none")
TRAIN = TrainConfig(augment=False, learning_rate=1e-9, weight_decay=0.0, precision="fp32")
CPU = torch.device("cpu")

Numbers = NDArray[np.float64]
Coins = NDArray[np.bool_]


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the probability of at least ``correct`` correct guesses under (epsilon, delta) privacy.

    With delta 0, the number of correct guesses is stochastically dominated by
    W ~ Binomial(guesses, q) with q = e^epsilon / (1 + e^epsilon). With delta greater than 0, it is
    dominated by W plus additional correct guesses, of which at most 2 * canaries * delta are
    expected. In the worst case these occur i at a time or not at all, and make up the difference
    where W falls short of ``correct`` by at most i.

    Args:
        canaries: number of canaries.
        guesses: number of guessed coins.
        correct: number of correct guesses.
        epsilon: the hypothesis to test, 0 or more.
        delta: probability in [0, 1).

    Raises:
        ValueError: if there are more correct guesses than guesses, or more guesses than canaries.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            "expected 0 <= correct guesses <= guesses <= canaries, got "
            f"{correct}, {guesses}, {canaries}"
        )
    right = expit(epsilon)
    enough = binom.sf(correct - 1, guesses, right)
    if correct == 0 or delta == 0:
        return float(enough)
    short = np.arange(1, correct + 1)
    by_so_much_or_less = np.cumsum(binom.pmf(correct - short, guesses, right))
    worst = (by_so_much_or_less / short).max()
    return float(min(1.0, enough + 2 * canaries * delta * worst))


def lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Compute the largest epsilon that the number of correct guesses refutes.

    Args:
        canaries: number of canaries, each included by a fair coin.
        guesses: number of guessed coins, fixed before the round.
        correct: number of correct guesses.
        delta: probability in [0, 1).
        confidence: minimum probability, over coins and noise, that the lower bound for an
            (epsilon, delta) private mechanism is at most epsilon.

    Returns:
        The lower bound of epsilon, 0 or more.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Case:
    """A private round to audit.

    Attributes:
        says: description in the table.
        noise_multiplier: standard deviation of the noise divided by the clipping norm.
        sample_rate: probability that a unit is drawn in a step.
        steps: number of steps.
        canaries: number of canaries.
        network: ``linear`` for one layer over the pixels, for which the gradients of the canaries
            are orthogonal; ``small`` for a small version of the project's network.
        images: number of images per canary; with more than one, each canary is a patient.
        gradients: how per-unit gradients are computed, see ``privacy.gradients``.
    """

    says: str
    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    canaries: int = 1000
    network: Literal["linear", "small"] = "linear"
    images: int = 1
    gradients: Literal["ghost", "hooks"] = "ghost"

    @property
    def unit(self) -> Literal["example", "patient"]:
        """The privacy unit."""
        return "example" if self.images == 1 else "patient"

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism of the round."""
        return Mechanism(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            units=self.canaries,
            clip_norm=CLIP_NORM,
        )

    @property
    def epsilon(self) -> float:
        """Epsilon as accounted by the privacy ledger."""
        spent = accounting.DpEvent(self.noise_multiplier, self.sample_rate, self.steps)
        return accounting.epsilon([spent], DELTA)


CASES: Mapping[str, Case] = {
    "step": Case("one step", noise_multiplier=1.0),
    "little-noise": Case("one step, little noise", noise_multiplier=0.4),
    "steps": Case("many sampled steps", noise_multiplier=0.9, sample_rate=0.1, steps=100),
    "patients": Case("one step, patients", noise_multiplier=1.0, images=8),
    "network": Case("one step, network", noise_multiplier=0.4, canaries=160, network="small"),
    "network-hooks": Case(
        "one step, network, hooks", 0.4, canaries=160, network="small", gradients="hooks"
    ),
}


@dataclass(frozen=True)
class Audit:
    """The result of an audit."""

    says: str
    network: str
    unit: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    canaries: int
    guesses: int
    correct: int
    at_least: float  # measured lower bound of epsilon, at ``confidence``
    accounted: float  # epsilon according to the accounting
    delta: float = DELTA
    confidence: float = CONFIDENCE

    @property
    def holds(self) -> bool:
        """True if the measured lower bound does not exceed the accounted epsilon."""
        return self.at_least <= self.accounted


def audit(
    case: Case,
    seed: int | None = None,
    train_privately: Callable[..., object] = train_one_round_privately,
) -> Audit:
    """Train one round with canaries, guess which were included, and bound epsilon from below.

    Args:
        case: the round to audit.
        seed: seed of coins, canaries, sampling and noise; None for the operating system's random
            numbers, as at a site.
        train_privately: the function to audit; tests pass broken implementations.
    """
    random = np.random.default_rng(seed)
    model, canaries = (_linear if case.network == "linear" else _small)(case, random)
    coins = random.random(case.canaries) < 0.5
    directions = directions_of(model, canaries, case.unit)
    mechanism = case.mechanism
    found: list[Tensor] = []
    with _released(_trained(model, canaries), lambda released: found.append(directions @ released)):
        train_privately(
            model,
            _kept(canaries, np.repeat(coins, case.images)),
            Round(1, 1, 0, "audit"),
            mechanism=mechanism,
            data=DATA,
            train=TRAIN,
            loss=LOSS,
            privacy=PrivacyConfig(
                mode="dp-sgd",
                unit=case.unit,
                noise_multiplier=mechanism.noise_multiplier,
                delta=DELTA,
                clip_norm=mechanism.clip_norm,
                physical_batch_size=PASS,
                gradients=case.gradients,
            ),
            device=CPU,
            random=None if seed is None else random,
        )
    sums = torch.stack(found).double().numpy() * mechanism.expected_units / mechanism.clip_norm
    evidence = evidence_of_canaries(sums, directions, mechanism)
    guesses, correct, at_least = best_bound(evidence, coins, DELTA)
    return Audit(
        case.says,
        case.network,
        f"{case.unit}" if case.images == 1 else f"{case.unit} of {case.images}",
        case.noise_multiplier,
        case.sample_rate,
        case.steps,
        case.canaries,
        guesses,
        correct,
        at_least,
        case.epsilon,
    )


def evidence_of_canaries(sums: Numbers, directions: Tensor, mechanism: Mechanism) -> Numbers:
    """Compute the log likelihood ratio of each canary's presence to its absence, over all steps.

    Least squares separates the canaries' shares of a step's gradient sum, which leaves Gaussian
    noise of deviation s on each share x. A canary that is present is drawn with probability q and
    then adds 1, so the log ratio is log(1 - q + q N(x; 1, s) / N(x; 0, s)). It is exact if the
    directions are orthogonal.

    Args:
        sums: products of the gradient sums with the directions, in units of the clipping norm.
        directions: the contribution of each canary, in units of the clipping norm.
        mechanism: noise multiplier and sampling rate.

    Shapes:
        sums:       (steps, m)
        directions: (m, P)
        out:        (m,)
    """
    apart = np.linalg.inv((directions @ directions.T).double().numpy())
    shares = sums @ apart
    variance = mechanism.noise_multiplier**2 * np.diag(apart)
    q = mechanism.sample_rate
    with np.errstate(divide="ignore"):  # log 0 is correct for a sampling rate of 1
        drawn_or_not = np.logaddexp(np.log1p(-q), np.log(q) + (shares - 0.5) / variance)
    return np.asarray(drawn_or_not.sum(axis=0), np.float64)


def best_bound(evidence: Numbers, coins: Coins, delta: float) -> tuple[int, int, float]:
    """Guess the coins with the strongest evidence, for each share, and choose the best bound.

    Returns:
        The number of guesses, the number of correct guesses, and the lower bound of epsilon.

    Shapes:
        evidence: (m,), log likelihood ratios
        coins:    (m,), bool, True if the canary was included
    """
    right = (evidence > 0) == coins
    surest = np.argsort(-np.abs(evidence), kind="stable")
    doubt = (1 - CONFIDENCE) / len(SHARES)
    tried = []
    for share in SHARES:
        guesses = max(1, round(share * len(coins)))
        correct = int(right[surest[:guesses]].sum())
        tried.append(
            (guesses, correct, lower_bound(len(coins), guesses, correct, delta, 1 - doubt))
        )
    return max(tried, key=lambda found: found[2])


def directions_of(model: MultiTaskUNet, canaries: Examples, unit: str) -> Tensor:
    """Compute each canary's contribution to a step's gradient sum, in units of the clipping norm.

    Each is computed by an ordinary backward pass, independently of the audited code.

    Shapes:
        out: (units, P) with P trained parameters, rows of norm 1 or less
    """
    network = copy.deepcopy(model).train()
    trained = _trained(network, canaries)
    dataset = ExampleDataset(canaries)
    units = units_of(canaries, unit)
    directions = torch.empty(len(units), sum(p.numel() for p in trained))
    for direction, places in zip(directions, units, strict=True):
        batch = default_collate([dataset[int(place)] for place in places])
        images, targets = to_batch(batch, DATA.normalise, CPU)
        losses = multi_task_loss(network(images, canaries.tasks), targets, LOSS)
        gradient = _flat(torch.autograd.grad(losses.total.sum(), trained))
        torch.div(gradient, max(gradient.norm().item(), CLIP_NORM), out=direction)
    return directions


def _trained(model: MultiTaskUNet, canaries: Examples) -> list[nn.Parameter]:
    groups = ("encoder", *canaries.tasks)
    return [p for name, p in model.named_parameters() if group_of(name) in groups]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@contextmanager
def _released(parameters: Sequence[nn.Parameter], see: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass the gradient of every optimiser step, which DP-SGD protects, to ``see``."""

    def after_step(*_: object) -> None:
        see(_flat([cast(Tensor, parameter.grad) for parameter in parameters]))

    handle = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        handle.remove()


def _kept(examples: Examples, keep: Coins) -> Examples:
    return Examples(**{name: array[keep] for name, array in vars(examples).items()})


def _units(
    images: NDArray[np.uint8], masks: NDArray[np.uint8], case: Case, random: np.random.Generator
) -> Examples:
    """Make canaries of one image each with random labels, the image repeated for patients."""
    n = case.canaries
    labels = np.eye(2, dtype=np.uint8)[random.integers(2, size=n)]
    once = Examples(
        images,
        masks,
        np.full((n, 1), bool(masks.any())),
        labels,
        np.full(n, True),
        np.array([f"canary {number:05}" for number in range(n)]),
    )
    return Examples(
        **{name: np.repeat(array, case.images, 0) for name, array in vars(once).items()}
    )


class _Pixels(nn.Module):
    """An encoder that returns the image as its only map."""

    stride = 1

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


class _LinearHead(nn.Module):
    """A linear layer from pixels to class logits, with weights initialised to 0.

    The gradient of cross-entropy with respect to the weights is then the image, multiplied by 1/2
    for one class and by -1/2 for the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIDE**2, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.layer(maps[0].flatten(1))


def _linear(case: Case, random: np.random.Generator) -> tuple[MultiTaskUNet, Examples]:
    """Make a one-layer network and orthogonal canaries."""
    rows = hadamard(SIDE**2)[1:]  # the first row is constant
    if case.canaries > len(rows):
        raise ValueError(
            f"canaries: expected at most {len(rows)}, the number of orthogonal images of "
            f"{SIDE} x {SIDE} pixels, got {case.canaries}"
        )
    pictures = random.permutation(rows)[: case.canaries].reshape(-1, SIDE, SIDE, 1)
    images = (255 * (pictures > 0)).astype(np.uint8)
    model = MultiTaskUNet(
        cast(ResFormer, _Pixels()),
        nn.ModuleList(),
        cast(Decoder, nn.Identity()),
        cast(MultiScaleHead, _LinearHead()),
    )
    return model, _units(images, np.zeros_like(images), case, random)


SMALL = ModelConfig(
    backbone="resnet18",
    width=16,
    depths=(1, 1, 1, 1),
    stride=4,  # canaries are easier to distinguish than with 2
    swin_depth=1,
    head_channels=8,
    mlp_ratio=1.0,
    drop_path=0.0,
    dfe="none",
)


def _small(case: Case, random: np.random.Generator) -> tuple[MultiTaskUNet, Examples]:
    """Make a small network with all kinds of layers, and canaries with random images and masks."""
    shape = (case.canaries, SIDE, SIDE, 1)
    images = random.integers(256, size=shape).astype(np.uint8)
    masks = random.integers(2, size=shape).astype(np.uint8)
    model = build_model(SMALL, size=(SIDE, SIDE), in_channels=1, image_classes=2, seed=0)
    return model, _units(images, masks, case, random)


def run_audit(only: str | None, seed: int | None, as_json: bool) -> int:
    """Run audits and print the results to standard output, messages to standard error.

    Args:
        only: names of cases, separated by commas; None for all.
        seed: see ``audit``.
        as_json: True to print the results as JSON, False to print a table.

    Returns:
        The exit status: 1 if a lower bound is above the accounted epsilon, otherwise 0.

    Raises:
        ConfigError: if a case is unknown.
    """
    names = only.split(",") if only else list(CASES)
    for name in names:
        if name not in CASES:
            raise ConfigError(f"--only: expected names among {', '.join(CASES)}, got {name!r}")
    words = messages()
    audits = [
        audit(CASES[name], seed)
        for name in track(names, "private rounds with canaries", console=words, transient=True)
    ]
    if as_json:
        print_json({"audits": [asdict(found) for found in audits]})
    else:
        print_table(table(audits))
    broken = [found for found in audits if not found.holds]
    for found in broken:
        words.print(
            f"{found.says}: the measured lower bound of epsilon, {found.at_least:.3g}, exceeds the "
            f"accounted epsilon, {found.accounted:.3g}: the mechanism or the accounting is wrong. "
            f"At most one audit in {1 / (1 - CONFIDENCE):.0f} fails by chance; repeat with other "
            "seeds",
            soft_wrap=True,
        )
    return 1 if broken else 0


def table(audits: Sequence[Audit]) -> Table:
    """Format the results as a table."""
    laid = Table(
        title=f"Audit of epsilon at delta {DELTA:g} and confidence {CONFIDENCE:.0%}",
        title_justify="left",
        caption=(
            "canaries: each included by a fair coin; guesses: number of coins guessed by the "
            "attacker; lower bound: measured from the correct guesses; accounted: epsilon "
            "according to the privacy ledger"
        ),
        caption_justify="left",
    )
    for name in ("round", "network", "unit"):
        laid.add_column(name)
    columns = (
        *("noise", "rate", "steps", "canaries"),
        *("guesses", "correct", "lower bound", "accounted"),
    )
    for name in columns:
        laid.add_column(name, justify="right")
    for found in audits:
        laid.add_row(
            found.says,
            found.network,
            found.unit,
            f"{found.noise_multiplier:g}",
            f"{found.sample_rate:g}",
            str(found.steps),
            str(found.canaries),
            str(found.guesses),
            str(found.correct),
            f"{found.at_least:.2f}",
            f"{found.accounted:.2f}",
        )
    return laid
