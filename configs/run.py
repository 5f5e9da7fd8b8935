"""All settings of a run, with their defaults, ranges and descriptions.

The settings of a run are transmitted as Flower's *run config*: one flat table of dotted kebab-case
keys (``train.batch-size``) with values of type bool, int, float or str. Only
``RunConfig.from_flat`` reads this table; all other code gets the smallest section that it needs
(``config.train``), which is typed, frozen and validated. The same keys and defaults are in
pyproject.toml, because Flower requires them there (a test compares the two). The presets next to
this file contain only the settings that differ.

Flower has no lists, so a list is one comma-separated string (``"benign,malignant"``).
"""

from __future__ import annotations

from typing import Self

from pydantic import ValidationError, model_validator

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.messages import explain, unknown_key
from polyclinic.configs.schema.base import Flat, Section, Value, join_values
from polyclinic.configs.schema.central import CentralConfig
from polyclinic.configs.schema.data import DataConfig, PhantomConfig
from polyclinic.configs.schema.evaluate import EvaluateConfig
from polyclinic.configs.schema.loss import LossConfig
from polyclinic.configs.schema.model import ModelConfig
from polyclinic.configs.schema.privacy import PrivacyConfig
from polyclinic.configs.schema.rounds import RoundsConfig, RunSection
from polyclinic.configs.schema.strategy import ROBUST, SERVER_OPTIMISERS, StrategyConfig
from polyclinic.configs.schema.train import TrainConfig


class RunConfig(Section):
    """All settings of a run."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    phantom: PhantomConfig = PhantomConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    rounds: RoundsConfig = RoundsConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    central: CentralConfig = CentralConfig()
    strategy: StrategyConfig = StrategyConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        weights = self.loss.class_weights
        if weights not in ("none", "balanced") and len(weights.split(",")) != len(
            self.data.classes
        ):
            raise ValueError(
                f"loss.class-weights: expected {len(self.data.classes)} numbers, one per class of "
                f"data.classes ({join_values(self.data.classes)}), got {weights!r}"
            )
        if self.data.label_kind == "multi-label" and self.loss.classification != "soft-margin":
            raise ValueError(
                "loss.classification: expected soft-margin, because with data.label-kind "
                "multi-label an image may have several classes or none, got "
                f"{self.loss.classification!r}"
            )
        self._check_sizes()
        if self.privacy.mode != "off":
            self._check_private()
        if self.central.mode != "off":
            self._check_central()
        name, shares_norms = self.strategy.name, self.strategy.personal != "norms"
        if name in SERVER_OPTIMISERS and self.model.norm == "batch" and shares_norms:
            raise ValueError(
                f"model.norm: expected group with strategy.name {name} (or strategy.personal "
                "norms), because the server's optimiser can make batch norm's variances negative; "
                "got batch"
            )
        return self

    def _check_sizes(self) -> None:
        """Refuse images that are too small for the network and windows of a single token."""
        deepest = 8 * self.model.stride
        side = min(self.data.image_height, self.data.image_width)
        if side <= deepest:
            raise ValueError(
                f"data.image-height and data.image-width: expected more than {deepest} with "
                f"model.stride {self.model.stride}, so that the deepest feature map is larger "
                f"than one pixel, got {side}"
            )
        if self.model.window == 1:
            raise ValueError(
                "model.window: expected 0 or at least 2, because attention needs several tokens "
                "in a window, got 1"
            )

    def _check_private(self) -> None:
        """Refuse settings that couple the gradients of units, and noise that is not defined."""
        wanted = (
            (
                "data.split",
                self.data.split,
                "independent",
                "in a stratified split, one patient influences the split of others",
            ),
            (
                "model.norm",
                self.model.norm,
                "group",
                "with batch norm, one image influences the gradients of others",
            ),
            (
                "train.grad-checkpointing",
                self.train.grad_checkpointing,
                False,
                "the second forward pass would be counted as further images",
            ),
            (
                "train.compile",
                self.train.compile,
                False,
                "a compiled model gives no gradients per image",
            ),
        )
        for key, value, expected, why in wanted:
            if value != expected:
                raise ValueError(
                    f"{key}: expected {str(expected).lower()} with privacy.mode dp-sgd, because "
                    f"{why}; got {str(value).lower()}"
                )
        if self.loss.class_weights == "balanced":
            raise ValueError(
                "loss.class-weights: expected none, or one number per class, with privacy.mode "
                "dp-sgd, because balanced weights reveal the site's label frequencies; got balanced"
            )
        given = (self.privacy.target_epsilon > 0) + (self.privacy.noise_multiplier > 0)
        if given != 1:
            raise ValueError(
                "privacy: expected one of target-epsilon and noise-multiplier above 0, got "
                f"{self.privacy.target_epsilon:g} and {self.privacy.noise_multiplier:g}"
            )

    def _check_central(self) -> None:
        """Refuse settings that central differential privacy does not cover or would break."""
        if self.model.norm == "batch" and self.strategy.personal != "norms":
            raise ValueError(
                f"model.norm: expected group with central.mode {self.central.mode} (or "
                "strategy.personal norms), because noise can make batch norm's variances negative "
                "and its counters invalid; got batch"
            )
        if self.strategy.name in ROBUST:
            raise ValueError(
                f"strategy.name: expected none of {', '.join(ROBUST)} with central.mode "
                f"{self.central.mode}, because the noise is calibrated for an average; got "
                f"{self.strategy.name}"
            )
        if self.rounds.fraction < 1:
            raise ValueError(
                f"rounds.fraction: expected 1 with central.mode {self.central.mode}, because the "
                f"accounting assumes every site in every round; got {self.rounds.fraction:g}"
            )
        noise, count_noise = self.central.noise_multiplier, self.central.clipped_count_stddev
        if self.central.mode == "adaptive" and count_noise > 0 and noise >= 2 * count_noise:
            raise ValueError(
                "central.clipped-count-stddev: expected 0, or more than half of "
                f"central.noise-multiplier ({noise:g}), got {count_noise:g}: the count of clipped "
                "updates would cost more privacy than the whole multiplier allows"
            )

    @classmethod
    def from_flat(cls, flat: Flat) -> RunConfig:
        """Read Flower's flat table of settings; missing keys get their defaults.

        Raises:
            ConfigError: naming every key that is unknown, of the wrong kind or out of range.
        """
        known = cls().to_flat()
        problems = [unknown_key(key, known) for key in flat if key not in known]
        nested: dict[str, dict[str, Value]] = {}
        for key, value in flat.items():
            if key in known:
                if isinstance(known[key], bool) != isinstance(value, bool):
                    wanted = "true or false" if isinstance(known[key], bool) else "text or a number"
                    problems.append(f"{key}: expected {wanted}, got {value!r}")
                    continue
                if isinstance(known[key], str) and isinstance(value, int | float):
                    value = str(value)  # in rounds.min-sites=2, TOML reads the text as a number
                section, _, name = key.partition(".")
                nested.setdefault(section, {})[name] = value
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            problems += [explain(detail, known) for detail in error.errors()]
        if problems:
            raise ConfigError("; ".join(problems))
        return config

    def to_flat(self) -> dict[str, Value]:
        """Return the settings as Flower's flat table, with every key."""
        tables = self.model_dump(by_alias=True)
        return {
            f"{section}.{name}": value
            for section, table in tables.items()
            for name, value in table.items()
        }


# Keys (or their beginnings) that may change when a run is resumed.
CHANGEABLE = ("run.", "rounds.", "data.root", "train.device", "evaluate.batch-size")


def resumed(stored: RunConfig, given: RunConfig) -> RunConfig:
    """Return the settings of a resumed run: the stored ones, with the requested changes.

    A setting with its default value counts as not given, because Flower passes every key.

    Args:
        stored: settings with which the run started.
        given: settings with which it is resumed.

    Raises:
        ConfigError: naming each setting that cannot change when a run is resumed.
    """
    default, flat = RunConfig().to_flat(), stored.to_flat()
    problems = []
    for key, value in given.to_flat().items():
        if value in (default[key], flat[key]):
            continue
        if key.startswith(CHANGEABLE):
            flat[key] = value
        else:
            problems.append(
                f"{key}: expected {flat[key]!r}, the value of the stored run, got {value!r}"
            )
    if problems:
        raise ConfigError(f"run.resume: {'; '.join(problems)}")
    return RunConfig.from_flat(flat)
