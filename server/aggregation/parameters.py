"""Divide the network's weights into a shared part and a personal part, which stays at the sites."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from polyclinic.configs.schema.strategy import StrategyConfig
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.mtl_model.personal import personal_names


@dataclass(frozen=True)
class Parts:
    """A network's layout, with the entries that stay at the sites (``strategy.personal``)."""

    whole: Layout  # layout of the whole network
    names: frozenset[str]  # names of the personal entries; empty if all weights are shared

    @classmethod
    def of(cls, network: MultiTaskUNet, strategy: StrategyConfig) -> Parts:
        """Divide a network according to ``strategy.personal``."""
        return cls(Layout.of(network), personal_names(network, strategy.personal))

    @cached_property
    def shared(self) -> Layout:
        """Return the layout of the weights that are sent and averaged."""
        return self.whole.parts(self.names)[0]

    @cached_property
    def personal(self) -> Layout:
        """Return the layout of the weights that stay at the sites."""
        return self.whole.parts(self.names)[1]

    def divide(self, weights: Packed) -> tuple[Packed, Packed]:
        """Divide weights into the shared weights and the personal ones."""
        if not self.names:
            return weights, {}
        state = self.whole.unpack(weights)
        return self.shared.pack(state), self.personal.pack(state)

    def unite(self, shared: Packed, personal: Packed) -> Packed:
        """Merge shared and personal weights into the weights of the whole network."""
        if not self.names:
            return shared
        return self.whole.pack(self.shared.unpack(shared) | self.personal.unpack(personal))
