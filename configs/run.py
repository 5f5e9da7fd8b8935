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

import difflib
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

Value = bool | int | float | str
Flat = Mapping[str, Value]


class ConfigError(ValueError):
    """A setting is unknown or out of range. The message names each one and what is allowed."""


def kebab(name: str) -> str:
    return name.replace("_", "-")


def _split(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _join(values: tuple[object, ...]) -> str:
    return ",".join(str(value) for value in values)


Names = Annotated[tuple[str, ...], BeforeValidator(_split), PlainSerializer(_join)]
Counts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split), PlainSerializer(_join)
]


LabelKind = Literal["exclusive", "multi-label"]
LABEL_SEPARATOR = ";"  # between the classes of a multi-label cell
NO_LABEL = "none"  # such a cell of an image that is known to have none of them


class Section(BaseModel):
    """One table of settings: frozen, kebab-case outside, snake_case inside, nothing unknown."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )


class RunSection(Section):
    """Where a run's results go, and the seed from which all its randomness follows."""

    name: str = Field(
        "", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", description="Folder name; empty: by time."
    )
    output_dir: str = Field("runs", min_length=1, description="Folder that holds run folders.")
    seed: int = Field(0, ge=0)
    resume: str = Field(
        "", description="A run to go on with: its name in output-dir, or its folder."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="The coordinator's log; json: one object a line."
    )


class DataConfig(Section):
    """What the images are and how every site reads and splits them."""

    root: str = Field("", description="Simulated sites' data; empty: phantom hospitals.")
    sites: Names = Field((), description="Only these sites; empty: all.")
    classes: Names = Field(("benign", "malignant"), description="Image classes, in order.")
    label_kind: LabelKind = Field(
        "exclusive", description="exclusive: an image has one class; multi-label: any of them."
    )
    positive: str = Field("malignant", description="Class that sensitivity and AUC refer to.")
    drop_labels: Names = Field((), description="Labels whose rows are left out.")
    mask_classes: Names = Field(("lesion",), description="What masks outline, in order.")
    mask_kind: Literal["exclusive", "overlapping"] = Field(
        "exclusive", description="exclusive: a pixel has one class at most; overlapping: any."
    )
    image_height: int = Field(64, ge=32, le=2048, description="Pixels after resizing.")
    image_width: int = Field(64, ge=32, le=2048, description="Pixels after resizing.")
    channels: Literal[1, 3, 4] = Field(1, description="Grey, RGB or RGBA.")
    resize: Literal["pad", "stretch"] = Field("pad", description="pad keeps the aspect ratio.")
    normalise: Literal["image", "fixed"] = Field(
        "image", description="image: each image to mean 0, deviation 1; fixed: (x/255-0.5)/0.25."
    )
    val_fraction: float = Field(0.15, ge=0.0, lt=1.0)
    test_fraction: float = Field(0.2, ge=0.0, lt=1.0)
    split: Literal["stratified", "independent"] = Field(
        "stratified",
        description="independent: no patient's split depends on others, as dp-sgd needs.",
    )
    split_seed: int = Field(0, ge=0)
    on_error: Literal["skip", "refuse"] = Field(
        "skip", description="What an image that cannot be read does to its site."
    )

    @property
    def indexed_masks(self) -> bool:
        """Whether a mask file holds an index a pixel: 0 background, k the k-th mask class."""
        return self.mask_kind == "exclusive" and len(self.mask_classes) > 1

    @property
    def mask_channels(self) -> int:
        """Maps of mask logits: one a class, and one of background before them where a softmax
        tells the classes apart."""
        return len(self.mask_classes) + self.indexed_masks

    @model_validator(mode="after")
    def _named_classes(self) -> Self:
        least = 2 if self.label_kind == "exclusive" else 1
        if len(self.classes) < least:
            raise ValueError(
                f"data.classes: expected at least {'two names' if least == 2 else 'one name'}, "
                f"got {_join(self.classes)!r}"
            )
        if not 1 <= len(self.mask_classes) <= 255:  # an index is a byte
            raise ValueError(
                f"data.mask-classes: expected 1 to 255 names, got {len(self.mask_classes)}"
            )
        for key, names in (("classes", self.classes), ("mask-classes", self.mask_classes)):
            if len(set(names)) != len(names):
                raise ValueError(f"data.{key}: expected distinct names, got {_join(names)!r}")
        for name in self.classes:
            if self.label_kind == "multi-label" and (name == NO_LABEL or LABEL_SEPARATOR in name):
                raise ValueError(
                    f"data.classes: expected names without {LABEL_SEPARATOR!r} and none called "
                    f"{NO_LABEL!r}, which multi-label cells are written with, got {name!r}"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.positive not in self.classes:
            raise ValueError(
                f"data.positive: expected one of data.classes ({_join(self.classes)}), "
                f"got {self.positive!r}"
            )
        both = set(self.drop_labels) & set(self.classes)
        if both:
            raise ValueError(
                f"data.drop-labels: {_join(tuple(sorted(both)))} is also in data.classes"
            )
        if self.val_fraction + self.test_fraction >= 1.0:
            raise ValueError(
                "data.val-fraction + data.test-fraction: expected a sum below 1, "
                f"got {self.val_fraction + self.test_fraction}"
            )
        return self


class PhantomConfig(Section):
    """The simulated hospitals that stand in when data.root is empty."""

    sites: int = Field(3, ge=1, le=100)
    examples: int = Field(120, ge=10, le=100_000, description="Images a site, on average.")
    size: int = Field(96, ge=32, le=1024, description="Long side of the images, pixels.")
    seed: int = Field(0, ge=0)
    normal_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="Share without a lesion.")
    without_masks: Names = Field((), description="Sites that have no masks (site-1,...).")
    without_labels: Names = Field((), description="Sites that have no labels.")


# What model.preset stands for: for every name, the settings in which it differs from the defaults.
PRESETS: Mapping[str, Mapping[str, Value]] = {
    "full": {},
    "light": {
        "backbone": "resnet18",
        "stride": 4,
        "mlp-ratio": 2.0,
        "dfe": "none",
    },
}


class ModelConfig(Section):
    """The network's shape (docs/model.md). Defaults: the published one, but for group norm.

    A preset changes the settings that are at their defaults; others given beside it stay. (Flower
    hands over every key, so that a default that was written out cannot be told from one that was
    not: to have a default in place of a preset's value, name the settings instead of the preset.
    ``load_run_config``, which can tell, refuses it.)
    """

    preset: Literal["full", "light"] = Field(
        "full", description="light: a tenth of the operations; docs/model.md has what it sets."
    )
    backbone: str = Field(
        "resnet34", pattern=r"^[a-z0-9_.]+$", description="timm model that is the CNN path."
    )
    pretrained: str = Field(
        "none",
        min_length=1,
        description="CNN path's first weights: none, timm (downloads), or a file at the server.",
    )
    stride: Literal[2, 4] = Field(
        2, description="Image side over the first map's; 4: the backbone's own, 2: half its stem's."
    )
    width: int = Field(
        0, ge=0, multiple_of=16, description="Channels of a ResNet's first stage; 0: its own."
    )
    depths: Counts = Field((), description="Blocks of a ResNet's 4 stages; empty: its own.")
    swin_depth: int = Field(2, ge=0, le=8, description="Transformer blocks a stage.")
    head_channels: int = Field(32, ge=4, description="Least channels of one attention head.")
    window: int = Field(0, ge=0, description="Window side, tokens; 0: the deepest map's side.")
    mlp_ratio: float = Field(4.0, ge=0.125)
    drop_path: float = Field(0.1, ge=0.0, lt=1.0, description="Of the last block; 0 at the first.")
    block_order: Literal["sequential", "parallel"] = "sequential"
    token_mixing: Literal["proper", "published"] = Field(
        "proper", description="published: channels and tokens mixed up, as in the authors' code."
    )
    norm: Literal["group", "batch"] = "group"
    dfe: Literal["concat", "sum", "none"] = "concat"
    dfe_rates: Counts = Field((6, 12, 18), description="Dilations; cut to the map's side - 1.")
    upsample: Literal["transpose", "bilinear"] = "transpose"
    head_stages: Counts = Field((3, 4), description="Encoder stages that the classifier sees.")
    head_width: int = Field(32, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given  # a section that was already read
        settings = dict(given)
        for key, value in PRESETS.get(str(given.get("preset", "full")), {}).items():
            name = key.replace("-", "_")
            default = cls.model_fields[name].default
            if all(settings.get(k, default) == default for k in (key, name)):
                settings.pop(name, None)
                settings[key] = value
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.depths and len(self.depths) != 4:
            raise ValueError(f"model.depths: expected 4 numbers, got {_join(self.depths)!r}")
        if len(self.dfe_rates) != 3:
            raise ValueError(f"model.dfe-rates: expected 3 numbers, got {_join(self.dfe_rates)!r}")
        if not self.head_stages or not set(self.head_stages) <= {1, 2, 3, 4}:
            raise ValueError(
                f"model.head-stages: expected stages from 1 to 4, got {_join(self.head_stages)!r}"
            )
        return self


class LossConfig(Section):
    """The two tasks' losses and how they are weighed against each other."""

    segmentation: Literal["dice", "dice+ce", "dice+focal"] = Field(
        "dice", description="Soft Dice alone, or with cross-entropy or focal loss a pixel."
    )
    focal_gamma: float = Field(
        2.0, ge=0.0, description="How much focal loss spares easy pixels; 0: cross-entropy."
    )
    classification: Literal["cross-entropy", "soft-margin"] = Field(
        "cross-entropy", description="soft-margin: each class for itself; multi-label needs it."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of a label given to all classes; soft-margin: to 0.5.",
    )
    classification_weight: float = Field(0.25, ge=0.0, description="Segmentation counts 1.")
    weighting: Literal["fixed", "uncertainty"] = Field(
        "fixed", description="uncertainty: the two weights are learned, from the fixed ones on."
    )
    class_weights: Annotated[
        str, Field(pattern=r"^(none|balanced|\d+(\.\d+)?(,\d+(\.\d+)?)*)$")
    ] = Field(
        "balanced", description="none, balanced (from the site's own labels), or one a class."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.weighting == "uncertainty" and self.classification_weight == 0:
            raise ValueError(
                "loss.classification-weight: expected more than 0 for loss.weighting "
                "uncertainty, which starts there, got 0"
            )
        return self


class TrainConfig(Section):
    """One site's local round."""

    local_epochs: int = Field(1, ge=1)
    local_steps: int = Field(0, ge=0, description="Steps a round instead of epochs; 0: epochs.")
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(1e-3, gt=0.0)
    poly_power: float = Field(0.9, ge=0.0, description="lr * (1 - step/steps)^power, whole run.")
    weight_decay: float = Field(3e-5, ge=0.0)
    clip_norm: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0: no clipping.")
    augment: bool = True
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU.")
    grad_checkpointing: bool = Field(
        False, description="Compute activations again instead of keeping them: memory for time."
    )
    compile: bool = Field(
        False, description="torch.compile training; takes minutes at first, and a C++ compiler."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")

    def steps(self, examples: int) -> int:
        """Optimiser steps of one local round; the last batch of an epoch may be smaller."""
        return self.local_steps or self.local_epochs * -(-examples // self.batch_size)


class RoundsConfig(Section):
    """How long a run goes on, and how long the server waits for its sites."""

    count: int = Field(10, ge=1)
    min_sites: str = Field(
        "all",
        pattern=r"^(all|[1-9][0-9]*|[1-9][0-9]?%|100%)$",
        description="Sites that must be there in each phase: all, a number, or a percentage of the "
        "run's sites (to train, of rounds.fraction of them).",
    )
    deadline_s: float = Field(3600.0, gt=0.0, description="Longest wait for a phase's answers.")
    keep_checkpoints: int = Field(2, ge=1, description="Rounds whose checkpoints are kept.")
    wait_for_sites_s: float = Field(
        120.0, gt=0.0, description="Longest wait for sites to connect, at start and in a phase."
    )
    fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="Sites drawn to train in a round; all are evaluated."
    )
    set_aside_after: int = Field(
        3, ge=0, description="Failures in a row after which a site rests; 0: never."
    )
    set_aside_rounds: int = Field(2, ge=1, description="Rounds for which it rests.")
    norm_factor: float = Field(
        10.0,
        ge=0.0,
        description="An update's norm over the sites' median, above which it is refused; 0: any.",
    )
    patience: int = Field(
        0, ge=0, description="Stop after so many rounds without a better one; 0: go on."
    )
    on_event: str = Field(
        "", description="Command at the server, given each event as a JSON line on its input."
    )

    @field_validator("on_event")
    @classmethod
    def _on_event_is_a_command(cls, value: str) -> str:
        try:
            shlex.split(value)
        except ValueError as error:
            raise ValueError(
                f"rounds.on-event: expected a command, got {value!r}: {error}"
            ) from None
        return value


class PrivacyConfig(Section):
    """Differential privacy of what a site's weights tell of its training images."""

    mode: Literal["off", "dp-sgd"] = Field(
        "off", description="dp-sgd: clip what each unit adds to a step, and add noise."
    )
    unit: Literal["example", "patient"] = Field(
        "patient", description="What is protected: one image, or all images of a patient."
    )
    target_epsilon: float = Field(
        0.0, ge=0.0, description="Of the whole run at each site; 0: noise-multiplier is given."
    )
    noise_multiplier: float = Field(
        0.0, ge=0.0, description="Noise over clip-norm; 0: from target-epsilon."
    )
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="Below 1 over a site's units.")
    clip_norm: float = Field(1.0, gt=0.0, description="Most that a unit adds to a step's gradient.")
    adaptive_clipping: bool = Field(
        False,
        description="Let clip-norm, from each round's start, follow the units' gradients; what "
        "that costs is accounted for.",
    )
    clip_quantile: float = Field(
        0.5, gt=0.0, lt=1.0, description="Share of units that adaptive clipping leaves whole."
    )
    clip_rate: float = Field(0.2, gt=0.0, description="Of adaptive clipping, a step.")
    physical_batch_size: int = Field(
        8, ge=1, description="Images at once in memory; a step may take several such."
    )
    gradients: Literal["ghost", "hooks"] = Field(
        "ghost",
        description="How units are told apart, with the same numbers: ghost is faster and "
        "smaller; hooks is Opacus's own way.",
    )


class CentralConfig(Section):
    """Differential privacy of the averaged model: the consortium's, whose unit is a whole site.

    The coordinator sees each site's weights, and must be trusted to clip them and to add the noise.
    ``privacy`` is the sites' own and needs no such trust. docs/privacy.md tells the two apart.
    """

    mode: Literal["off", "fixed", "adaptive"] = Field(
        "off", description="Clip each site's update, add noise; adaptive: the clip norm learns."
    )
    noise_multiplier: float = Field(
        1.0, gt=0.0, description="Noise on the sum over clip-norm; adaptive: the count's included."
    )
    clip_norm: float = Field(
        1.0, gt=0.0, description="Largest norm of a site's whole update; adaptive: in round 1."
    )
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="Far below 1 over the number of sites.")
    target_clipped_quantile: float = Field(
        0.5, ge=0.0, le=1.0, description="adaptive: share of the sites' updates to be clipped."
    )
    clip_norm_lr: float = Field(
        0.2, gt=0.0, description="adaptive: step of the clip norm's logarithm in a round."
    )
    clipped_count_stddev: float = Field(
        0.0,
        ge=0.0,
        description="adaptive: noise on how many were clipped; 0: sites / 20, or the multiplier.",
    )


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


class EvaluateConfig(Section):
    """Evaluation at every site after every round, and which round's model is called best."""

    batch_size: int = Field(16, ge=1)
    select_by: Literal["score", "dice", "balanced-accuracy", "auc"] = Field(
        "score", description="Pooled value on val; score: mean of dice and balanced-accuracy."
    )
    hd95: bool = Field(
        False, description="95th percentile Hausdorff distance, pixels; wants polyclinic[metrics]."
    )


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
                f"data.classes ({_join(self.data.classes)}), got {weights!r}"
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
        problems = [_unknown(key, known) for key in flat if key not in known]
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
            problems += [_explained(detail) for detail in error.errors()]
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


def _unknown(key: str, known: Mapping[str, Value]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"{key}: unknown key; did you mean {near[0]}?"
    section = key.partition(".")[0]
    siblings = [k for k in known if k.startswith(f"{section}.")]
    if siblings:
        return f"{key}: unknown key; known keys of {section}: {', '.join(siblings)}"
    sections = sorted({k.partition(".")[0] for k in known})
    return f"{key}: unknown key; known sections: {', '.join(sections)}"


def _explained(detail: ErrorDetails) -> str:
    key = ".".join(kebab(str(part)) for part in detail["loc"] if not isinstance(part, int))
    if detail["type"] == "value_error":  # raised by our own validators, which name their key
        return str(detail["ctx"]["error"])
    allowed = (
        detail["msg"].replace("Input should be", "expected").replace("String should", "should")
    )
    return f"{key}: {allowed}, got {detail['input']!r}"


def read_preset(path: Path) -> dict[str, Value]:
    """The settings in one TOML preset, flattened to dotted keys, not yet checked.

    Raises:
        ConfigError: if the file is missing or is not TOML.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such preset") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, {error}") from None
    return _flattened(tables, "")


def _flattened(table: Mapping[str, Any], prefix: str) -> dict[str, Value]:
    flat: dict[str, Value] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value, f"{prefix}{key}."))
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = _join(tuple(value))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_override(text: str) -> tuple[str, Value]:
    """One ``key=value`` of a command line; the value is TOML, or text where it is not.

    Raises:
        ConfigError: if there is no ``=`` or no key before it.
    """
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r}: expected key=value, for example train.batch-size=4")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    if isinstance(value, list):
        value = _join(tuple(value))
    if not isinstance(value, bool | int | float | str):
        value = raw.strip()  # a date to TOML, a name to us
    return key.strip(), value


def load_run_config(preset: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the preset, then each ``key=value``.

    Raises:
        ConfigError: naming every key that is unknown or out of range, or that a preset of the model
            would overrule.
    """
    flat = read_preset(preset) if preset else {}
    flat.update(read_override(text) for text in overrides)
    config = RunConfig.from_flat(flat)
    settled = config.to_flat()
    name = config.model.preset
    overruled = [
        f"model.{key}"
        for key, value in PRESETS[name].items()
        if f"model.{key}" in flat and settled[f"model.{key}"] == value != flat[f"model.{key}"]
    ]
    if overruled:
        raise ConfigError(
            f"{', '.join(overruled)}: model.preset={name} sets it; to have the default, give the "
            "preset's other settings one by one instead of the preset"
        )
    return config
