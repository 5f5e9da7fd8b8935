"""What a run may be told: every setting of a run, its default, its range and what it means.

A run's settings travel as Flower's *run config*: one flat table of dotted kebab-case keys
(``train.batch-size``) whose values are bool, int, float or str. ``RunConfig.from_flat`` is the
one place that reads it; everything behind it gets the smallest section that serves
(``config.train``), typed, frozen and checked. The same keys with the same defaults stand in
pyproject.toml, where Flower wants them (a test compares the two), and presets beside this file
name the few that differ.

A list is written as one string with commas (``"benign,malignant"``), since Flower knows no lists.
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
                f"loss.class-weights: expected {len(self.data.classes)} numbers, one a class of "
                f"data.classes ({join_values(self.data.classes)}), got {weights!r}"
            )
        if self.data.label_kind == "multi-label" and self.loss.classification != "soft-margin":
            raise ValueError(
                "loss.classification: expected soft-margin, since with data.label-kind multi-label "
                f"an image may have several classes or none, got {self.loss.classification!r}"
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
                "norms), since a server's steps can make batch norm's variances negative; got batch"
            )
        return self

    def _check_sizes(self) -> None:
        """Refuse what leaves a token nothing to attend to, or a convolution only padding."""
        deepest = 8 * self.model.stride
        side = min(self.data.image_height, self.data.image_width)
        if side <= deepest:
            raise ValueError(
                f"data.image-height and data.image-width: expected more than {deepest} with "
                f"model.stride {self.model.stride}, whose deepest map would be of one pixel, got "
                f"{side}"
            )
        if self.model.window == 1:
            raise ValueError(
                "model.window: expected 0 or 2 tokens and more, since alone a token has none to "
                "attend to, got 1"
            )

    def _check_private(self) -> None:
        """Refuse what would let one unit act on another's gradient, and noise left open."""
        wanted = (
            (
                "data.split",
                self.data.split,
                "independent",
                "stratified, one patient decides where others go",
            ),
            ("model.norm", self.model.norm, "group", "batch norm lets one image act on others"),
            (
                "train.grad-checkpointing",
                self.train.grad_checkpointing,
                False,
                "its second pass would be counted as other images",
            ),
            (
                "train.compile",
                self.train.compile,
                False,
                "it gives no gradient an image",
            ),
        )
        for key, value, expected, why in wanted:
            if value != expected:
                raise ValueError(
                    f"{key}: expected {str(expected).lower()} with privacy.mode dp-sgd, since "
                    f"{why}; got {str(value).lower()}"
                )
        if self.loss.class_weights == "balanced":
            raise ValueError(
                "loss.class-weights: expected none, or a number a class, with privacy.mode dp-sgd: "
                "weights balanced by a site's labels tell of them; got balanced"
            )
        given = (self.privacy.target_epsilon > 0) + (self.privacy.noise_multiplier > 0)
        if given != 1:
            raise ValueError(
                "privacy: expected one of target-epsilon and noise-multiplier above 0, got "
                f"{self.privacy.target_epsilon:g} and {self.privacy.noise_multiplier:g}"
            )

    def _check_central(self) -> None:
        """Refuse what no noise on the average can cover, or would break."""
        if self.model.norm == "batch" and self.strategy.personal != "norms":
            raise ValueError(
                f"model.norm: expected group with central.mode {self.central.mode} (or "
                "strategy.personal norms), since noise makes batch norm's variances negative and "
                "its counters senseless; got batch"
            )
        if self.strategy.name in ROBUST:
            raise ValueError(
                f"strategy.name: expected none of {', '.join(ROBUST)} with central.mode "
                f"{self.central.mode}, whose noise is made for an average; got {self.strategy.name}"
            )
        if self.rounds.fraction < 1:
            raise ValueError(
                f"rounds.fraction: expected 1 with central.mode {self.central.mode}, whose account "
                f"has every site in every round; got {self.rounds.fraction:g}"
            )
        noise, count_noise = self.central.noise_multiplier, self.central.clipped_count_stddev
        if self.central.mode == "adaptive" and count_noise > 0 and noise >= 2 * count_noise:
            raise ValueError(
                "central.clipped-count-stddev: expected 0, or more than half of "
                f"central.noise-multiplier ({noise:g}), got {count_noise:g}: the count alone would "
                "cost more than that noise is worth"
            )

    @classmethod
    def from_flat(cls, flat: Flat) -> RunConfig:
        """Read Flower's flat table of settings; keys that are absent keep their defaults.

        Raises:
            ConfigError: naming every key that is unknown, of the wrong kind or out of range.
        """
        known = cls().to_flat()
        problems = [unknown_key(key, known) for key in flat if key not in known]
        nested: dict[str, dict[str, Value]] = {}
        for key, value in flat.items():
            if key in known:
                if isinstance(known[key], bool) != isinstance(value, bool):
                    wanted = "true or false" if isinstance(known[key], bool) else "no true or false"
                    problems.append(f"{key}: expected {wanted}, got {value!r}")
                    continue
                if isinstance(known[key], str) and isinstance(value, int | float):
                    value = str(value)  # rounds.min-sites=2 is a text that looks like a number
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
        """The same settings as Flower's flat table, every key present."""
        tables = self.model_dump(by_alias=True)
        return {
            f"{section}.{name}": value
            for section, table in tables.items()
            for name, value in table.items()
        }


# What may be another when a run goes on; everything else would make it another run.
CHANGEABLE = ("run.", "rounds.", "data.root", "train.device", "evaluate.batch-size")


def resumed(stored: RunConfig, given: RunConfig) -> RunConfig:
    """The settings that a run goes on with: its own, with the changes that were asked for.

    A setting that is given as its default counts as not given, since Flower hands over every key.

    Raises:
        ConfigError: naming each setting that a run cannot change on its way.
    """
    default, flat = RunConfig().to_flat(), stored.to_flat()
    problems = []
    for key, value in given.to_flat().items():
        if value in (default[key], flat[key]):
            continue
        if key.startswith(CHANGEABLE):
            flat[key] = value
        else:
            problems.append(f"{key}: expected {flat[key]!r}, as the run began, got {value!r}")
    if problems:
        raise ConfigError(f"run.resume: {'; '.join(problems)}")
    return RunConfig.from_flat(flat)
