"""Settings ``strategy``: how the sites' weights are averaged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyclinic.configs.schema.base import Section

# Strategies that keep a few bad sites from moving the model, and those with a state at the server.
ROBUST = ("fedmedian", "trimmed-mean", "krum", "multi-krum")


SERVER_OPTIMISERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")


class StrategyConfig(Section):
    """How the sites' weights become one, and what of them stays at the sites."""

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
    ] = Field("fedavg", description="All by task; docs/strategies.md has each one's arithmetic.")
    proximal_mu: float = Field(
        0.01, gt=0.0, description="fedprox: pull of a site's weights to those that were sent."
    )
    server_learning_rate: float = Field(
        0.0,
        ge=0.0,
        description="fedavgm and the adaptive ones; 0: 1 for fedavgm, 0.01 for the others.",
    )
    server_momentum: float = Field(0.9, ge=0.0, lt=1.0, description="fedavgm.")
    beta_1: float = Field(0.9, ge=0.0, lt=1.0, description="fedadam, fedyogi: of the first moment.")
    beta_2: float = Field(0.99, ge=0.0, lt=1.0, description="And of the second.")
    tau: float = Field(
        1e-3, gt=0.0, description="fedadam, fedyogi, fedadagrad: added to the second's root."
    )
    trim_fraction: float = Field(
        0.2, ge=0.0, lt=0.5, description="trimmed-mean: sites left out at each end, rounded down."
    )
    malicious_sites: int = Field(1, ge=0, description="krum, multi-krum: how many to withstand.")
    krum_sites: int = Field(
        0, ge=0, description="multi-krum: sites that are averaged; 0: all but malicious-sites."
    )
    personal: Literal["none", "norms", "heads"] = Field(
        "none",
        description="What stays at each site: normalisation layers, or all behind the encoder.",
    )

    @property
    def mu(self) -> float:
        """The proximal term's weight, 0 where there is none."""
        return self.proximal_mu if self.name == "fedprox" else 0.0
