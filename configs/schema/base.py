"""The base class and value types of all sections of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Value = bool | int | float | str  # value of one setting in Flower's run config
Flat = Mapping[str, Value]  # settings by dotted key, such as train.batch-size


def kebab(name: str) -> str:
    """Convert a Python name to kebab-case."""
    return name.replace("_", "-")


def split_values(value: object) -> object:
    """Split a comma-separated text into a tuple; return any other value unchanged."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def join_values(values: tuple[object, ...]) -> str:
    """Join values into one comma-separated text."""
    return ",".join(str(value) for value in values)


# A list of names, and a list of numbers from 1, each written as comma-separated text.
Names = Annotated[tuple[str, ...], BeforeValidator(split_values), PlainSerializer(join_values)]
Counts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(split_values),
    PlainSerializer(join_values),
]


class Section(BaseModel):
    """A section of settings.

    Sections are frozen and refuse unknown keys. Keys are kebab-case in files and snake_case in
    Python.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def known_keys(kind: type[Section], prefix: str = "") -> list[str]:
    """List every key of a section and its subsections, dotted and in kebab-case."""
    found = []
    for name, field in kind.model_fields.items():
        key = f"{prefix}{kebab(name)}"
        found.append(key)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                found += known_keys(inner, f"{key}.")
    return found
