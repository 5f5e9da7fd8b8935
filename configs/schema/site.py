"""What a deployed site says of itself: ``site.yaml``, which the server cannot change."""

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
    "drop-labels, if rows are dropped), because this site has a cohort or a budget, got none. It "
    "fixes which patients train, validate and test, so that no run can choose them. Copy the "
    "values from the run's settings (polyclinic's docs/privacy.md, \"The site's split\")"
)


class CohortConfig(Section):
    """Whose images these are, as the site declares it: public, and never counted from the data."""

    name: str = Field("", pattern=rf"{NAME}|^$", description="Owns a budget; if empty, the site's.")
    examples: int | None = Field(None, ge=1, description="Images that may train, declared.")
    patients: int | None = Field(None, ge=1, description="People whom they show, declared.")


class BudgetConfig(Section):
    """The most that training may ever tell of one unit of the cohort."""

    epsilon: float = Field(gt=0, description="Over all runs together.")
    delta: float = Field(gt=0, lt=1, description="Below 1 / units of the cohort.")
    unit: Literal["example", "patient"] = Field(description="What one unit is.")


class SiteDataConfig(Section):
    """How a private site reads and divides its rows. Runs must ask for the same and change nothing.

    Every key has the name and the meaning that it has in a run's ``data`` section.
    """

    classes: Names = Field(description="Image classes, in the run's order.")
    mask_classes: Names = Field(description="What masks outline, in the run's order.")
    val_fraction: float = Field(ge=0, lt=1, description="Share of patients that choose a model.")
    test_fraction: float = Field(ge=0, lt=1, description="Share of patients that test a model.")
    drop_labels: Names = Field((), description="Labels whose rows are not used.")
    label_kind: LabelKind = "exclusive"
    mask_kind: Literal["exclusive", "overlapping"] = "exclusive"
    on_error: Literal["skip", "refuse"] = "skip"
    split: Literal["independent"] = Field(
        "independent", description="A patient's place depends on no other patient."
    )
    split_seed: int = Field(
        0, ge=0, description="Has no effect: the site's secret places patients."
    )

    def differences(self, data: DataConfig) -> list[str]:
        """Describe each setting of a run that is not this site's, by its name in the run."""
        return [
            f"data.{kebab(name)}: this site allows {_shown(own)}, "
            f"the run has {_shown(getattr(data, name))}"
            for name in type(self).model_fields
            if (own := getattr(self, name)) != getattr(data, name)
        ]


def _shown(value: object) -> str:
    return (",".join(value) or "none") if isinstance(value, tuple) else str(value)


class PolicyConfig(Section):
    """What the site allows, whatever a run asks for; what is not said is allowed."""

    tasks: tuple[Literal["segmentation", "classification"], ...] = Field(
        ("segmentation", "classification"),
        min_length=1,
        description="Annotations of other tasks are taken as absent.",
    )
    evaluation: bool = Field(True, description="Whether models are tested on the site's images.")
    min_examples: int = Field(1, ge=1, description="Training images below which none trains.")
    min_patients: int = Field(1, ge=1, description="Their patients, likewise.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps of one round.")
    min_noise_multiplier: float = Field(
        0.0, ge=0, description="Noise multiplier of a private round, beside the budget's epsilon."
    )
    max_update_mb: float | None = Field(None, gt=0, description="Of the weights that leave.")
    max_update_norm: float | None = Field(
        None, gt=0, description="L2 norm of what a round changed in all weights together."
    )
    metrics: tuple[Literal["segmentation", "classification", "scores", "distances"], ...] = Field(
        ("segmentation", "classification", "scores", "distances"),
        description="Sums that may leave; scores are histograms, which AUC needs.",
    )
    min_support: int = Field(
        10, ge=1, description="Images of a kind below which their sums and counts are withheld."
    )
    releases: tuple[str, ...] | None = Field(
        None, description="Digests of releases that may ask; `polyclinic site release` prints one."
    )
    hours: str | None = Field(
        None, description="When the site works, local time, as 20:00-06:00; always if absent."
    )
    name_files: bool = Field(
        False, description="Whether reasons that name files go to the server, or to the log alone."
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
    """From when to when a site works.

    Raises:
        ValueError: if the text is not two different times.
    """
    try:
        start, end = (time.fromisoformat(part.strip()) for part in text.split("-"))
    except ValueError:
        start = end = time()
    if start == end:
        raise ValueError(f"policy.hours: expected two times, as 20:00-06:00, got {text!r}")
    return start, end


class CoordinatorConfig(Section):
    """Where the coordinator is, and what this site and it know each other by."""

    address: str = Field(min_length=1, description="A name or an IP address.")
    port: int = Field(PUBLIC, ge=1, le=65535)
    ca: Path = Field(Path("ca.crt"), description="Who vouches for it; relative to site.yaml.")
    key: Path = Field(Path("site.key"), description="The site's private key, likewise.")
    certificate: Path = Field(
        Path("site.crt"), description="What the coordinator says of that key, likewise."
    )


class SiteConfig(Section):
    """Who a site is, where its images lie, and what it may spend on training with privacy."""

    name: str = Field(pattern=NAME, description="As in all tables.")
    data_root: Path = Field(description="Folder with labels.csv; relative to site.yaml.")
    state: Path = Field(
        Path("state"), description="Folder for what must outlast a run; relative to site.yaml."
    )
    server: CoordinatorConfig | None = Field(
        None, description="Needed by `polyclinic site start`; a kit's site.yaml has it."
    )
    release_signer: str = Field(
        "", description="Ed25519 public key; with one, releases are approved if it signed them."
    )
    cohort: CohortConfig | None = Field(
        None, description="Declared numbers of the patients that a budget protects."
    )
    budget: BudgetConfig | None = Field(
        None, description="With a budget, the site only takes part in private runs, within it."
    )
    data: SiteDataConfig | None = Field(
        None, description="Needed with a cohort or a budget: how the site's rows are divided."
    )
    policy: PolicyConfig = PolicyConfig()

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
        """Whether this site only answers runs with differential privacy."""
        return self.cohort is not None or self.budget is not None

    @property
    def cohort_name(self) -> str:
        return (self.cohort.name if self.cohort else "") or self.name

    def units(self, unit: Literal["example", "patient"]) -> int | None:
        """How many of a unit the cohort has, as declared."""
        if self.cohort is None:
            return None
        return self.cohort.examples if unit == "example" else self.cohort.patients


def read_site_config(path: Path) -> SiteConfig:
    """Read and check a ``site.yaml``.

    Raises:
        ConfigError: if it is missing, is not YAML, or has unknown or wrong keys.
    """
    config = read_yaml(path, SiteConfig, "site file", "name and data-root")
    update: dict[str, object] = {
        key: _placed(path, getattr(config, key)) for key in ("data_root", "state")
    }
    if config.server is not None:
        files = {k: _placed(path, getattr(config.server, k)) for k in ("ca", "key", "certificate")}
        update["server"] = config.server.model_copy(update=files)
    return config.model_copy(update=update)


File = TypeVar("File", bound=Section)


def read_yaml(path: Path, kind: type[File], what: str, keys: str) -> File:
    """Read and check a file of settings.

    Args:
        what: the file is, and
        keys: that it must have, in words.

    Raises:
        ConfigError: if it is missing, is not YAML, or has unknown or wrong keys.
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


def _placed(site_file: Path, path: Path) -> Path:
    """A path of a site.yaml, which is relative to it."""
    return (site_file.parent / path.expanduser()).resolve()
