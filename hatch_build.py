"""Build hook for the wheel: ship ``polyclinic.py`` as ``polyclinic/__init__.py``."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackageHook(BuildHookInterface):
    """Adds ``polyclinic/__init__.py`` to the wheel; an editable install does not need it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"]["polyclinic.py"] = "polyclinic/__init__.py"
