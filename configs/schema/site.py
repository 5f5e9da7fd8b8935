"""The file ``site.yaml``: settings of a deployed site, which the coordinator cannot change."""

from __future__ import annotations

import re
from datetime import time
from pathlib import Path
from typing import Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.messages import explain
from polyclinic.configs.ports import PUBLIC
from polyclinic.configs.schema.base import Names, Section, kebab, known_keys
from polyclinic.configs.schema.data import DataConfig, LabelKind

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


DATA_MISSING = (
    "data: expected a section with classes, mask-classes, val-fraction and test-fraction (and "
    "drop-labels, if rows are left out), because this site has a cohort or a budget, got none. The "
    "section fixes which patients train, validate and test, so that no run can choose them. Copy "
    "the values from the run's settings (polyclinic's docs/privacy.md, \"The site's split\")"
)


class CohortConfig(Section):
    """The patients of a site's images, as the site declares them.

    These numbers are public. They are declared and never counted from the data.
    """

    name: str = Field(
        "",
        pattern=rf"{NAME}|^$",
        description="Name of the cohort, to which the privacy ledger charges the runs; empty: the "
        "site's name.",
    )
    examples: int | None = Field(
        None,
        ge=1,
        description="Declared number of images that may be used for training. Required if "
        "budget.unit is example.",
    )
    patients: int | None = Field(
        None,
        ge=1,
        description="Declared number of patients with images that may be used for training. "
        "Required if budget.unit is patient.",
    )


class BudgetConfig(Section):
    """Limit on the privacy loss of one unit of the cohort over all runs."""

    epsilon: float = Field(gt=0, description="Epsilon that all runs together may spend.")
    delta: float = Field(
        gt=0,
        lt=1,
        description="Delta of the (epsilon, delta) guarantee, below 1 / the number of units of the "
        "cohort.",
    )
    unit: Literal["example", "patient"] = Field(
        description="Unit that the budget protects. example: one image; patient: all images of a "
        "patient."
    )


class SiteDataConfig(Section):
    """Split and labels of a private site's images. Runs must have the same values.

    Every key has the name and the meaning that it has in a run's ``data`` section.
    """

    classes: Names = Field(description="Names of the image classes, in the run's order.")
    mask_classes: Names = Field(
        description="Names of the classes that masks outline, in the run's order."
    )
    val_fraction: float = Field(
        ge=0,
        lt=1,
        description="Share of the patients that is used for validation, which selects the best "
        "round; 0: none.",
    )
    test_fraction: float = Field(
        ge=0, lt=1, description="Share of the patients that is used for the final test; 0: none."
    )
    drop_labels: Names = Field(
        (), description="Images with one of these labels are left out; empty: keep all."
    )
    label_kind: LabelKind = Field(
        "exclusive",
        description="Kind of the image labels. exclusive: each image has one class; multi-label: "
        "an image has any number of classes, also none.",
    )
    mask_kind: Literal["exclusive", "overlapping"] = Field(
        "exclusive",
        description="Kind of the masks. exclusive: each pixel has at most one mask class; "
        "overlapping: a pixel can have several.",
    )
    on_error: Literal["skip", "refuse"] = Field(
        "skip",
        description="Reaction to an image or mask that cannot be used. skip: leave it out and "
        "report it; refuse: refuse the run.",
    )
    split: Literal["independent"] = Field(
        "independent",
        description="Method that splits patients into training, validation and test. independent: "
        "each patient's split depends on no other patient.",
    )
    split_seed: int = Field(
        0,
        ge=0,
        description="Seed of the split; must be the run's. It has no effect, because a private "
        "site splits its patients by a secret.",
    )

    def differences(self, data: DataConfig) -> list[str]:
        """Describe each setting of a run that differs from this site's."""
        return [
            f"data.{kebab(name)}: this site allows {_shown(own)}, "
            f"the run has {_shown(getattr(data, name))}"
            for name in type(self).model_fields
            if (own := getattr(self, name)) != getattr(data, name)
        ]


def _shown(value: object) -> str:
    return (",".join(value) or "none") if isinstance(value, tuple) else str(value)


class PolicyConfig(Section):
    """Limits that the site sets for every run. Without a limit, everything is allowed."""

    tasks: tuple[Literal["segmentation", "classification"], ...] = Field(
        ("segmentation", "classification"),
        min_length=1,
        description="Tasks that may use the site's annotations. Annotations of other tasks are "
        "ignored.",
    )
    evaluation: bool = Field(True, description="Allow models to be evaluated on the site's images.")
    min_examples: int = Field(
        1,
        ge=1,
        description="Minimum number of training images; with fewer the site does not train.",
    )
    min_patients: int = Field(
        1,
        ge=1,
        description="Minimum number of patients with training images; with fewer the site does not "
        "train.",
    )
    max_steps: int | None = Field(
        None, ge=1, description="Maximum number of optimiser steps per round; none: no limit."
    )
    min_noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="Minimum noise multiplier of a private run, in addition to the budget; 0: no "
        "minimum.",
    )
    max_update_mb: float | None = Field(
        None,
        gt=0,
        description="Maximum size of the weights that the site sends per round, in MB (1,000,000 "
        "bytes); none: no limit.",
    )
    max_update_norm: float | None = Field(
        None,
        gt=0,
        description="Maximum L2 norm of the change of all weights in a round; none: no limit.",
    )
    metrics: tuple[Literal["segmentation", "classification", "scores", "distances"], ...] = Field(
        ("segmentation", "classification", "scores", "distances"),
        description="Evaluation results that the site may send. segmentation, classification: "
        "counts per class; scores: histograms of predicted scores, which AUC needs; distances: "
        "sums of Hausdorff distances.",
    )
    min_support: int = Field(
        10,
        ge=1,
        description="Minimum group size, in images. The site withholds counts and sums of smaller "
        "groups, such as a rare class; 1: withhold none.",
    )
    releases: tuple[str, ...] | None = Field(
        None,
        description="SHA-256 digests of the releases that may run at the site, as `polyclinic site "
        "release` prints them; none: every release that the site has approved.",
    )
    hours: str | None = Field(
        None,
        description="Hours in which the site takes part, in local time, as 20:00-06:00; none: "
        "always.",
    )
    name_files: bool = Field(
        False,
        description="Send file names in error messages to the coordinator. If false, they are only "
        "in the site's log.",
    )

    @field_validator("hours")
    @classmethod
    def _hours_are_two_times(cls, value: str | None) -> str | None:
        if value is not None:
            opening_hours(value)
        return value

    @field_validator("releases")
    @classmethod
    def _releases_are_digests(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for digest in value or ():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(
                    f"policy.releases: expected sha256 digests (64 hexadecimal digits), got "
                    f"{digest!r}"
                )
        return value


def opening_hours(text: str) -> tuple[time, time]:
    """Parse the hours in which a site takes part.

    Args:
        text: two times of day, such as ``20:00-06:00``.

    Returns:
        Start and end, in local time. The end may be before the start, on the next day.

    Raises:
        ValueError: if the text is not two different times.
    """
    try:
        start, end = (time.fromisoformat(part.strip()) for part in text.split("-"))
    except ValueError:
        start = end = time()
    if start == end:
        raise ValueError(
            f"policy.hours: expected two different times, as 20:00-06:00, got {text!r}"
        )
    return start, end


class CoordinatorConfig(Section):
    """Address of the coordinator, and the certificates and key for the connection."""

    address: str = Field(min_length=1, description="Host name or IP address of the coordinator.")
    port: int = Field(PUBLIC, ge=1, le=65535, description="TCP port of the coordinator.")
    ca: Path = Field(
        Path("ca.crt"),
        description="File with the certificate of the federation's authority, which signs the "
        "coordinator's; relative to site.yaml.",
    )
    key: Path = Field(
        Path("site.key"),
        description="File with the site's private key; relative to site.yaml.",
    )
    certificate: Path = Field(
        Path("site.crt"),
        description="File with the site's certificate, which says until when the coordinator "
        "accepts the key; relative to site.yaml.",
    )


class SiteConfig(Section):
    """Settings of a deployed site: its name, images, privacy budget and policy."""

    name: str = Field(
        pattern=NAME,
        description="Name of the site in all tables and files: letters, digits, '.', '_' and '-'.",
    )
    data_root: Path = Field(
        description="Folder with the site's images and labels.csv; relative to site.yaml."
    )
    state: Path = Field(
        Path("state"),
        description="Folder for files that are kept between runs, such as the privacy ledger; "
        "relative to site.yaml.",
    )
    server: CoordinatorConfig | None = Field(
        None,
        description="Address and credentials of the coordinator. Needed by `polyclinic site "
        "start`; the site.yaml of a kit has it.",
    )
    release_signer: str = Field(
        "",
        description="Ed25519 public key of the person who signs releases, one line as OpenSSH "
        "writes it. With a key, only releases that it signed can be approved; empty: signatures "
        "are not checked.",
    )
    cohort: CohortConfig | None = Field(
        None,
        description="Declared numbers of images and patients. With a cohort, the site only takes "
        "part in private runs.",
    )
    budget: BudgetConfig | None = Field(
        None,
        description="Privacy budget. With a budget, the site only takes part in private runs that "
        "stay within it.",
    )
    data: SiteDataConfig | None = Field(
        None,
        description="Split and labels of the site's images. Required with a cohort or a budget.",
    )
    policy: PolicyConfig = Field(
        PolicyConfig(), description="Limits that the site sets for every run."
    )

    @model_validator(mode="after")
    def _private_site_owns_its_split(self) -> Self:
        if self.private and self.data is None:
            raise ValueError(DATA_MISSING)
        return self

    @model_validator(mode="after")
    def _budget_fits_the_cohort(self) -> Self:
        if self.budget is None:
            return self
        units = self.units(self.budget.unit)
        if units is None:
            raise ValueError(
                f"cohort.{self.budget.unit}s: expected a number, since budget.unit is "
                f"{self.budget.unit}, got none"
            )
        if self.budget.delta >= 1 / units:
            raise ValueError(
                f"budget.delta: expected less than 1 / {units} (cohort.{self.budget.unit}s), got "
                f"{self.budget.delta:g}"
            )
        return self

    @property
    def private(self) -> bool:
        """Whether this site only takes part in runs with differential privacy."""
        return self.cohort is not None or self.budget is not None

    @property
    def cohort_name(self) -> str:
        """Name of the cohort: its own, or the site's."""
        return (self.cohort.name if self.cohort else "") or self.name

    def units(self, unit: Literal["example", "patient"]) -> int | None:
        """Return the declared number of units of the cohort; None if it is not declared."""
        if self.cohort is None:
            return None
        return self.cohort.examples if unit == "example" else self.cohort.patients


def read_site_config(path: Path) -> SiteConfig:
    """Read and check a ``site.yaml``.

    Raises:
        ConfigError: if the file is missing, is not valid YAML, or has unknown or invalid keys.
    """
    config = read_yaml(path, SiteConfig, "site file", "name and data-root")
    update: dict[str, object] = {
        key: _resolve(path, getattr(config, key)) for key in ("data_root", "state")
    }
    if config.server is not None:
        files = {k: _resolve(path, getattr(config.server, k)) for k in ("ca", "key", "certificate")}
        update["server"] = config.server.model_copy(update=files)
    return config.model_copy(update=update)


File = TypeVar("File", bound=Section)


def read_yaml(path: Path, kind: type[File], what: str, keys: str) -> File:
    """Read and check a YAML file of settings.

    Args:
        path: the file.
        kind: the schema.
        what: name of the kind of file, for error messages.
        keys: required keys in words, for error messages.

    Raises:
        ConfigError: if the file is missing, is not valid YAML, or has unknown or invalid keys.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys {keys}, got {content!r}")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(explain(detail, known_keys(kind)) for detail in error.errors())
        raise ConfigError(f"{path}: {problems}") from None


def _resolve(site_file: Path, path: Path) -> Path:
    """Resolve a path of a site.yaml relative to the file's folder."""
    return (site_file.parent / path.expanduser()).resolve()
