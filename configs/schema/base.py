"""What every section of settings has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Value = bool | int | float | str


Flat = Mapping[str, Value]


def kebab(name: str) -> str:
    return name.replace("_", "-")


def split_values(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def join_values(values: tuple[object, ...]) -> str:
    return ",".join(str(value) for value in values)


Names = Annotated[tuple[str, ...], BeforeValidator(split_values), PlainSerializer(join_values)]


Counts = Annotated[
    tuple[Annotated[int, Field(ge=1)], ...],
    BeforeValidator(split_values),
    PlainSerializer(join_values),
]


class Section(BaseModel):
    """One table of settings: frozen, kebab-case outside, snake_case inside, nothing unknown."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=kebab,
        populate_by_name=True,
        allow_inf_nan=False,
    )


def known_keys(kind: type[Section], prefix: str = "") -> list[str]:
    """Every key of a file of this kind, dotted and in kebab-case."""
    found = []
    for name, field in kind.model_fields.items():
        key = f"{prefix}{kebab(name)}"
        found.append(key)
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, Section):
                found += known_keys(inner, f"{key}.")
    return found
