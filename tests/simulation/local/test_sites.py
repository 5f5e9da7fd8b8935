"""Data of simulated sites: the cache of phantom hospitals."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

import pytest

from polyclinic.configs.schema.data import PhantomConfig
from polyclinic.simulation.local.sites import phantom_root
from polyclinic.simulation.phantom import physics, sites, writer


@pytest.mark.parametrize("changed", [sites, physics, writer], ids=lambda module: module.__name__)
def test_phantom_root_with_changed_source_of_a_module_uses_another_folder(
    changed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(writer, "write_phantoms", lambda *_args, **_options: None)
    before = phantom_root(PhantomConfig(), 2)
    assert phantom_root(PhantomConfig(), 2) == before
    original = inspect.getsource
    monkeypatch.setattr(
        inspect,
        "getsource",
        lambda module: original(module) + ("# changed\n" if module is changed else ""),
    )
    assert phantom_root(PhantomConfig(), 2) != before
