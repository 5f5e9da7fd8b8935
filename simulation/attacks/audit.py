"""How much of a private round an attacker sees: a lower bound of epsilon, measured.

The audit of Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023,
arXiv 2305.08846). Many canaries are put among a round's units or left out, each by a coin of its
own; an attacker sees the round and guesses the coins that it is surest of. If the round is private
with some epsilon, guesses are rarely right more often than e^epsilon / (1 + e^epsilon) of the time:
so many right ones say that epsilon is at least so large. ``accounting.epsilon`` says that it is at
most so large. A lower bound above it means that one of the two, or the mechanism, is wrong.

The round is ``train_one_round_privately`` as sites run it. The attacker is as strong as the claim
in docs/privacy.md allows: knows the weights, the settings and every canary, and sees each step's
noisy gradient, which is more than leaves a site; canaries are made to be told apart, and the
learning rate is so small that they stay as they were at the first step. The bound is far below the
accounted one even so, because coins are guessed all at once, from one round: it shows errors of a
multiple, and says nothing of small ones.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
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
SIDE = 32  # of the canaries, pixels
CLIP_NORM = 1.0
PASS = 64  # images at once

# How many coins are guessed, of all: several shares are tried, and the bound of each is taken at
# its part of what confidence leaves, so that the best may be told.
SHARES = (0.1, 0.4, 1.0)

DATA = DataConfig(image_height=SIDE, image_width=SIDE)
LOSS = LossConfig(class_weights="none")
TRAIN = TrainConfig(augment=False, learning_rate=1e-9, weight_decay=0.0, precision="fp32")
CPU = torch.device("cpu")

Numbers = NDArray[np.float64]
Coins = NDArray[np.bool_]


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, under (epsilon, delta).

    Without delta, right guesses are dominated by W ~ Binomial(guesses, q), q being
    e^epsilon / (1 + e^epsilon). With it, by W and some more, of which 2 x canaries x delta are to
    be expected at most; the worst that they can do is to come i at once, or not at all, and fill
    the gap where W falls short by i or less.

    Raises:
        ValueError: if there are more right guesses than guesses, or more guesses than canaries.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            "expected right guesses, guesses and canaries, none more than the next, got "
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
    """The largest epsilon that so many right guesses speak against.

    Args:
        canaries: each included by a fair coin.
        guesses: coins guessed; how many was settled before the round.
        confidence: the probability, over coins and noise, that a mechanism that is
            (epsilon, delta) private gives a lower bound of epsilon at most.
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
        network: ``linear``: one layer over the pixels, whose gradients of the canaries are
            orthogonal; ``small``: the project's network, small.
        images: of each canary; several are a patient.
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
        return "example" if self.images == 1 else "patient"

    @property
    def mechanism(self) -> Mechanism:
        return Mechanism(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            units=self.canaries,
            clip_norm=CLIP_NORM,
        )

    @property
    def epsilon(self) -> float:
        """As the ledger counts it."""
        spent = accounting.DpEvent(self.noise_multiplier, self.sample_rate, self.steps)
        return accounting.epsilon([spent], DELTA)


CASES: Mapping[str, Case] = {
    "step": Case("one step", noise_multiplier=1.0),
    "little-noise": Case("the same, little noise", noise_multiplier=0.4),
    "steps": Case("many sampled steps", noise_multiplier=0.9, sample_rate=0.1, steps=100),
    "patients": Case("one step, of patients", noise_multiplier=1.0, images=8),
    "network": Case("one step of the network", noise_multiplier=0.4, canaries=160, network="small"),
    "network-hooks": Case(
        "the same, by hooks", 0.4, canaries=160, network="small", gradients="hooks"
    ),
}


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    says: str
    network: str
    unit: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    canaries: int
    guesses: int
    correct: int
    at_least: float  # epsilon, at ``confidence``
    accounted: float  # epsilon
    delta: float = DELTA
    confidence: float = CONFIDENCE

    @property
    def holds(self) -> bool:
        return self.at_least <= self.accounted


def audit(
    case: Case,
    seed: int | None = None,
    train_privately: Callable[..., object] = train_one_round_privately,
) -> Audit:
    """Train one round with canaries, guess which were there, and bound epsilon from below.

    Args:
        seed: of coins, canaries, sampling and noise; None: the operating system, as at a site.
        train_privately: what is audited; tests put broken ones here.
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
    """Log likelihood ratio of each canary's being there to its not being there, over all steps.

    Of a step's sum, canaries' shares are told apart by least squares, which leaves Gaussian noise
    on each. One that is there was drawn with probability q and adds 1 then:
    log(1 - q + q N(x; 1, s) / N(x; 0, s)). Exact where directions are orthogonal.

    Shapes:
        sums:       (steps, m), the sum's products with the directions, in clipping norms
        directions: (m, P)
        out:        (m,)
    """
    apart = np.linalg.inv((directions @ directions.T).double().numpy())
    shares = sums @ apart
    variance = mechanism.noise_multiplier**2 * np.diag(apart)
    q = mechanism.sample_rate
    with np.errstate(divide="ignore"):  # a unit that is always drawn: log 0 is what it should be
        drawn_or_not = np.logaddexp(np.log1p(-q), np.log(q) + (shares - 0.5) / variance)
    return np.asarray(drawn_or_not.sum(axis=0), np.float64)


def best_bound(evidence: Numbers, coins: Coins, delta: float) -> tuple[int, int, float]:
    """Guess the coins there is most evidence of, for or against: guesses, right ones, the bound."""
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
    """(units, P) what each canary adds to a step's sum, in clipping norms.

    By one plain backward pass for each: apart from the code that is audited.
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
    """See the gradient that every optimiser's step was made of: what DP-SGD protects."""

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
    """Canaries of one picture each, several times where they are patients, with random labels."""
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
    """An encoder whose only map is the picture."""

    stride = 1

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


class _LinearHead(nn.Module):
    """Class logits straight from the pixels, all 0 at first.

    Cross-entropy's gradient of the weights is then the picture, times 1/2 for one class and -1/2
    for the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIDE**2, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.layer(maps[0].flatten(1))


def _linear(case: Case, random: np.random.Generator) -> tuple[MultiTaskUNet, Examples]:
    """One layer, and canaries that are orthogonal: each adds in a direction of its own."""
    rows = hadamard(SIDE**2)[1:]  # the first is blank
    if case.canaries > len(rows):
        raise ValueError(
            f"canaries: expected at most {len(rows)}, which are orthogonal at {SIDE} x {SIDE} "
            f"pixels, got {case.canaries}"
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
    stride=4,  # canaries are told apart better than with 2
    swin_depth=1,
    head_channels=8,
    mlp_ratio=1.0,
    drop_path=0.0,
    dfe="none",
)


def _small(case: Case, random: np.random.Generator) -> tuple[MultiTaskUNet, Examples]:
    """The network with all its kinds of layers; canaries of noise with masks of noise."""
    shape = (case.canaries, SIDE, SIDE, 1)
    images = random.integers(256, size=shape).astype(np.uint8)
    masks = random.integers(2, size=shape).astype(np.uint8)
    model = build_model(SMALL, size=(SIDE, SIDE), in_channels=1, image_classes=2, seed=0)
    return model, _units(images, masks, case, random)


def run_audit(only: str | None, seed: int | None, as_json: bool) -> int:
    """Audit and print, results to standard output and words to standard error.

    Returns:
        The exit status: 1 if a lower bound is above the accounted epsilon.

    Raises:
        ConfigError: for a case that is not known.
    """
    names = only.split(",") if only else list(CASES)
    for name in names:
        if name not in CASES:
            raise ConfigError(f"--only: expected names among {', '.join(CASES)}, got {name!r}")
    words = Console(stderr=True, markup=False, highlight=False)
    audits = [
        audit(CASES[name], seed)
        for name in track(names, "private rounds with canaries", console=words, transient=True)
    ]
    if as_json:
        sys.stdout.write(json.dumps([asdict(found) for found in audits], indent=2) + "\n")
    else:
        width = None if sys.stdout.isatty() else 120
        Console(width=width, markup=False, highlight=False).print(table(audits))
    broken = [found for found in audits if not found.holds]
    for found in broken:
        words.print(
            f"{found.says}: epsilon is at least {found.at_least:.3g}, though {found.accounted:.3g} "
            "is accounted for: the mechanism or the accounting is wrong, or, in one audit of "
            f"{1 / (1 - CONFIDENCE):.0f} at most, chance; try other seeds",
            soft_wrap=True,
        )
    return 1 if broken else 0


def table(audits: Sequence[Audit]) -> Table:
    """Lay out what was found."""
    laid = Table(
        title=f"epsilon at delta {DELTA:g}, from below at confidence {CONFIDENCE:.0%}",
        title_justify="left",
        caption=(
            "canaries: put in or left out by a coin each; guesses: coins that the attacker is "
            "surest of; at least: what right guesses show; at most: what the ledger counts"
        ),
        caption_justify="left",
    )
    for name in ("round", "network", "unit"):
        laid.add_column(name)
    columns = ("noise", "rate", "steps", "canaries", "guesses", "right", "at least", "at most")
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
