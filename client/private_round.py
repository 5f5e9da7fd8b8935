"""A private round within a site's budget: reserved in its ledger before the first step."""

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


def train_within_budget(
    model: MultiTaskUNet,
    examples: Examples,
    where: Round,
    standing: PrivacyDeclaration,
    config: RunConfig,
    policy: PolicyConfig,
    device: torch.device,
    proximal: Proximal = NO_PULL,
) -> tuple[TrainResult, BudgetReport]:
    """Train a round with differential privacy, if the site's budget has room for it.

    The round's cost is in the ledger, on the disk, before the first step; steps not taken come
    back afterwards. Whatever happens in between, the ledger never says less than what was done.

    Raises:
        Decline: if the round would exceed the budget, or the site's rules ask for another unit,
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
    """What one round will do, from settings and declared numbers alone.

    Raises:
        Decline: if no noise keeps the planned rounds within the target.
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


_noise_for = lru_cache(maxsize=8)(noise_for)  # seconds, and the same in every round


def _terms(
    privacy: PrivacyConfig, standing: PrivacyDeclaration
) -> tuple[Cohort, float, float | None]:
    """The ledger's cohort, delta and cap: the site's own, which no run can move."""
    cohort = Cohort(standing.cohort, privacy.unit, standing.units(privacy.unit))
    if standing.budget is None:
        return cohort, privacy.delta, None
    return cohort, standing.budget.delta, standing.budget.epsilon
