"""The error that reports invalid settings."""

from __future__ import annotations


class ConfigError(ValueError):
    """Settings are unknown or invalid. The message names each one and the values allowed."""
