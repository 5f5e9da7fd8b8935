"""Build hook of the wheel: ``polyclinic.py`` is also the ``__init__.py`` of its folder."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackageHook(BuildHookInterface):
    """Give the wheel's folder ``polyclinic`` its ``__init__.py``; a checkout needs none."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            build_data["force_include"]["polyclinic.py"] = "polyclinic/__init__.py"
