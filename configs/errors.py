"""The error that names a wrong setting."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting is unknown or out of range. The message names each one and what is allowed."""
