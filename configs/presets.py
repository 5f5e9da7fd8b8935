"""Read a run's settings from preset files and from overrides on the command line."""

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

PRESETS = Path(__file__).resolve().parent  # folder of the packaged presets, which are TOML files


def preset_names() -> list[str]:
    """List the names of the packaged presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def find_preset(preset: Path) -> Path:
    """Find a preset by its path, or a packaged preset by its name.

    Raises:
        ConfigError: if neither exists. The message lists the packaged presets.
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
    """Read the settings of a TOML preset, flattened to dotted keys, without validating them.

    Raises:
        ConfigError: if the preset does not exist or is not TOML.
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
    """Read the settings file in a run's folder, written by this version or an earlier one.

    Raises:
        ConfigError: if the file cannot be read or has invalid settings.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not found; expected a run's folder, which holds config.toml")
    flat = read_preset(path)
    try:
        return RunConfig.from_flat({RENAMED.get(key, key): value for key, value in flat.items()})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


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
    """Parse one ``key=value`` of the command line; a value that is not valid TOML is text.

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
        value = raw.strip()  # TOML has dates; the settings have none, so this is a name
    return key.strip(), value


def load_run_config(preset: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Combine the defaults, a preset and overrides, in this order; later values take precedence.

    Args:
        preset: path or name of a preset; None: no preset.
        overrides: ``key=value`` each.

    Raises:
        ConfigError: naming every key that is unknown or invalid, or that conflicts with
            ``model.preset``.
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
            f"{', '.join(overruled)}: model.preset={name} sets another value; to use the default, "
            "write out the preset's other settings instead of naming the preset"
        )
    return config
