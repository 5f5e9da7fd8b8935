"""What a deployed site says of itself: ``site.yaml``, which the server cannot change."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.run import ConfigError, kebab


class SiteConfig(BaseModel):
    """Who a site is and where its images lie."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=kebab, populate_by_name=True
    )

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="As in all tables.")
    data_root: Path = Field(description="Folder with labels.csv; relative to site.yaml.")


def read_site_config(path: Path) -> SiteConfig:
    """Read and check a ``site.yaml``.

    Raises:
        ConfigError: if it is missing, is not YAML, or has unknown or wrong keys.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such site file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected YAML, {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys name and data-root, got {content!r}")
    try:
        config = SiteConfig.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, d['loc']))}: {d['msg']}, got {d['input']!r}"
            for d in error.errors()
        ]
        raise ConfigError(f"{path}: " + "; ".join(problems)) from None
    root = config.data_root.expanduser()
    return config.model_copy(update={"data_root": (path.parent / root).resolve()})
