"""Presets and overrides of settings: files and command lines."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.messages import RENAMED
from polyclinic.configs.run import RunConfig
from polyclinic.configs.schema.base import Value, join_values
from polyclinic.configs.schema.model import MODEL_PRESETS

PRESETS = Path(__file__).resolve().parent  # packaged presets are the TOML files next to this module


def preset_names() -> list[str]:
    """Names of the packaged presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def find_preset(preset: Path) -> Path:
    """Find a preset by its path, or a packaged one by its name from any folder.

    Raises:
        ConfigError: listing the packaged presets, if there is neither.
    """
    if preset.exists():
        return preset
    packaged = PRESETS / f"{preset}.toml"
    if len(preset.parts) == 1 and packaged.is_file():
        return packaged
    raise ConfigError(
        f"{preset}: no such preset; give the path of a TOML file, or one of the packaged presets: "
        f"{', '.join(preset_names())}"
    )


def read_preset(preset: Path) -> dict[str, Value]:
    """Read the settings of a TOML preset, flattened to dotted keys, not yet checked.

    Raises:
        ConfigError: if there is no such preset, or it is not TOML.
    """
    path = find_preset(preset)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected TOML, {error}") from None
    return _flattened(tables, "")


def read_run_config(path: Path) -> RunConfig:
    """Read the settings that a run wrote into its folder, by this version or an earlier one.

    Raises:
        ConfigError: if the file cannot be read, or its settings are not those of a run.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not found; expected a run's folder, which holds config.toml")
    flat = read_preset(path)
    return RunConfig.from_flat({RENAMED.get(key, key): value for key, value in flat.items()})


def _flattened(table: Mapping[str, Any], prefix: str) -> dict[str, Value]:
    flat: dict[str, Value] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value, f"{prefix}{key}."))
        elif isinstance(value, list):
            flat[f"{prefix}{key}"] = join_values(tuple(value))
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
        value = join_values(tuple(value))
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
        for key, value in MODEL_PRESETS[name].items()
        if f"model.{key}" in flat and settled[f"model.{key}"] == value != flat[f"model.{key}"]
    ]
    if overruled:
        raise ConfigError(
            f"{', '.join(overruled)}: model.preset={name} sets it; to have the default, give the "
            "preset's other settings one by one instead of the preset"
        )
    return config
