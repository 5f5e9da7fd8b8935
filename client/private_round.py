"""Train a round with differential privacy within the site's privacy budget."""

from __future__ import annotations

from functools import lru_cache

import torch

from polyclinic.client.data.dataset import Examples
from polyclinic.client.ledger.budget import BudgetExceeded, Cohort, Ledger
from polyclinic.client.policy.site_policy import Decline, check_noise, check_steps, check_unit
from polyclinic.client.privacy.accounting import DpEvent, noise_for
from polyclinic.client.privacy.dp_sgd import (
    Adaptation,
    Mechanism,
    sampling,
    train_one_round_privately,
)
from polyclinic.client.site import BudgetReport, PrivacyDeclaration
from polyclinic.client.training.local_round import NO_PULL, Proximal, Round, TrainResult
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.site import PolicyConfig
from polyclinic.configs.schema.train import TrainConfig
from polyclinic.mtl_model.network import MultiTaskUNet


def train_within_budget(  # noqa: PLR0913 settings of one call, each used by name
    model: MultiTaskUNet,
    examples: Examples,
    where: Round,
    standing: PrivacyDeclaration,
    config: RunConfig,
    policy: PolicyConfig,
    device: torch.device,
    proximal: Proximal = NO_PULL,
) -> tuple[TrainResult, BudgetReport]:
    """Train a round with differential privacy if its cost fits the site's budget.

    The cost of the whole round is written to the ledger before the first step. Steps that were not
    run are credited afterwards. If the process dies in between, the ledger overstates what was
    spent and never understates it.

    Returns:
        The result of the round, and epsilon before and after it.

    Raises:
        Decline: if the round would exceed the budget, or if the site's rules require another unit,
            more noise or fewer steps.
        LedgerError: if the ledger cannot be used.
    """
    if standing.budget is not None:
        check_unit(standing.budget, config.privacy)
    mechanism = mechanism_of(config.train, config.privacy, config.rounds.count, standing)
    check_noise(policy, mechanism.noise_multiplier)
    check_steps(policy, mechanism.steps)
    cohort, delta, cap = _terms(config.privacy, standing)
    cost = DpEvent(mechanism.noise_multiplier, mechanism.sample_rate, mechanism.steps)
    with Ledger(standing.ledger, cohort, delta, cap) as ledger:
        before = ledger.spent()
        try:
            reservation = ledger.reserve(standing.run, where.number, cost)
        except BudgetExceeded as error:
            raise Decline(str(error)) from None
        result = train_one_round_privately(
            model,
            examples,
            where,
            mechanism=mechanism,
            data=config.data,
            train=config.train,
            loss=config.loss,
            privacy=config.privacy,
            device=device,
            proximal=proximal,
        )
        ledger.settle(reservation, result.steps)
        return result, BudgetReport(before, ledger.spent(), delta, cap)


def mechanism_of(
    train: TrainConfig, privacy: PrivacyConfig, rounds: int, standing: PrivacyDeclaration
) -> Mechanism:
    """Compute the privacy mechanism of one round from public settings and declared numbers only.

    Raises:
        Decline: if no amount of noise keeps the planned rounds within the target epsilon.
    """
    rate, steps = sampling(train, standing.examples)
    noise = privacy.noise_multiplier
    if not noise:
        budget = standing.budget
        delta = min(privacy.delta, budget.delta) if budget else privacy.delta  # the stricter
        try:
            noise = _noise_for(privacy.target_epsilon, delta, rate, steps * rounds)
        except ValueError as error:
            raise Decline(f"privacy.target-epsilon: {error}") from None
    units = standing.units(privacy.unit)
    adapts = Adaptation(privacy.clip_quantile, privacy.clip_rate)
    return Mechanism(
        noise, rate, steps, units, privacy.clip_norm, adapts if privacy.adaptive_clipping else None
    )


_noise_for = lru_cache(maxsize=8)(noise_for)  # takes seconds; the arguments repeat every round


def _terms(
    privacy: PrivacyConfig, standing: PrivacyDeclaration
) -> tuple[Cohort, float, float | None]:
    """Return cohort, delta and epsilon cap for the ledger; a site's own budget has precedence."""
    cohort = Cohort(standing.cohort, privacy.unit, standing.units(privacy.unit))
    if standing.budget is None:
        return cohort, privacy.delta, None
    return cohort, standing.budget.delta, standing.budget.epsilon
