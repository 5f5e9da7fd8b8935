"""The network's weights at the server: what travels, and what stays at the sites."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from polyclinic.configs.schema.strategy import StrategyConfig
from polyclinic.mtl_model.network import MultiTaskUNet
from polyclinic.mtl_model.packing import Layout, Packed
from polyclinic.mtl_model.personal import personal_names


@dataclass(frozen=True)
class Parts:
    """A network's layout, and the entries that are the sites' own (``strategy.personal``)."""

    whole: Layout
    names: frozenset[str]

    @classmethod
    def of(cls, network: MultiTaskUNet, strategy: StrategyConfig) -> Parts:
        return cls(Layout.of(network), personal_names(network, strategy.personal))

    @cached_property
    def shared(self) -> Layout:
        return self.whole.parts(self.names)[0]

    @cached_property
    def personal(self) -> Layout:
        return self.whole.parts(self.names)[1]

    def divide(self, weights: Packed) -> tuple[Packed, Packed]:
        """The weights that travel, and first values of those that do not."""
        if not self.names:
            return weights, {}
        state = self.whole.unpack(weights)
        return self.shared.pack(state), self.personal.pack(state)

    def unite(self, shared: Packed, personal: Packed) -> Packed:
        """Both as one again."""
        if not self.names:
            return shared
        return self.whole.pack(self.shared.unpack(shared) | self.personal.unpack(personal))
