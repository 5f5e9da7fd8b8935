"""Settings ``strategy``: aggregation of the sites' weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section

# Strategies that limit the influence of a few faulty or malicious sites.
ROBUST = ("fedmedian", "trimmed-mean", "krum", "multi-krum")
# Strategies with an optimiser at the server, which keeps a state between rounds.
SERVER_OPTIMISERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")


class StrategyConfig(Section):
    """Aggregation of the sites' weights, and the layers that each site keeps to itself."""

    name: Literal[
        "fedavg",
        "fedprox",
        "fedavgm",
        "fedadam",
        "fedyogi",
        "fedadagrad",
        "fedmedian",
        "trimmed-mean",
        "krum",
        "multi-krum",
    ] = Field(
        "fedavg",
        description="Aggregation strategy, applied per task. docs/strategies.md defines each one.",
    )
    proximal_mu: float = Field(
        0.01,
        gt=0.0,
        description="Weight of the proximal term, which pulls a site's weights towards those of "
        "the round's start. Used by fedprox.",
    )
    server_learning_rate: float = Field(
        0.0,
        ge=0.0,
        description="Learning rate of the server's optimiser; 0: 1 for fedavgm, 0.01 for fedadam, "
        "fedyogi and fedadagrad.",
    )
    server_momentum: float = Field(
        0.9, ge=0.0, lt=1.0, description="Momentum of the server's optimiser. Used by fedavgm."
    )
    beta_1: float = Field(
        0.9,
        ge=0.0,
        lt=1.0,
        description="Decay rate of the first moment. Used by fedadam and fedyogi.",
    )
    beta_2: float = Field(
        0.99,
        ge=0.0,
        lt=1.0,
        description="Decay rate of the second moment. Used by fedadam and fedyogi.",
    )
    tau: float = Field(
        1e-3,
        gt=0.0,
        description="Constant added to the square root of the second moment, which bounds the "
        "adaptive step. Used by fedadam, fedyogi and fedadagrad.",
    )
    trim_fraction: float = Field(
        0.2,
        ge=0.0,
        lt=0.5,
        description="Share of the sites that is left out at each end of every weight's values, "
        "rounded down to whole sites. Used by trimmed-mean.",
    )
    malicious_sites: int = Field(
        1,
        ge=0,
        description="Number of malicious sites that the strategy must withstand. Used by krum and "
        "multi-krum.",
    )
    krum_sites: int = Field(
        0,
        ge=0,
        description="Number of sites that are averaged; 0: all except strategy.malicious-sites. "
        "Used by multi-krum.",
    )
    personal: Literal["none", "norms", "heads"] = Field(
        "none",
        description="Layers that stay at each site and are not averaged. none: all are averaged; "
        "norms: the normalisation layers; heads: everything after the encoder.",
    )

    @property
    def mu(self) -> float:
        """Weight of the proximal term; 0 for strategies without one."""
        return self.proximal_mu if self.name == "fedprox" else 0.0
