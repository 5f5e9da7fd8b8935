"""Build hook of the wheel: ``polyclinic.py`` is also the ``__init__.py`` of its folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackageHook(BuildHookInterface):
    """Give the wheel's folder ``polyclinic`` its ``__init__.py``; a checkout needs none."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add copies of ``polyclinic.py`` to the wheel, unless the build is editable."""
        if version == "editable":
            return
        self.copies = Path(tempfile.mkdtemp())
        for name in ("__init__.py", "__main__.py"):  # the second for python -m polyclinic
            copy = shutil.copy(Path(self.root) / "polyclinic.py", self.copies / name)
            build_data["force_include"][str(copy)] = name

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the copies."""
        if version != "editable":
            shutil.rmtree(self.copies)
