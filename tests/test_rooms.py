"""Which room may import which: circles and shortcuts through walls are found here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "configs": set(),
    "mtl_model": {"configs"},
    "client": {"configs", "mtl_model"},
    "server": {"configs", "mtl_model"},
    "simulation": {"configs", "mtl_model", "client", "server"},
}
KEPT_IN = {
    "flwr": {"client", "server", "simulation"},
    "monai": {"mtl_model", "simulation"},
    "onnx": {"server"},
    "onnxruntime": {"mtl_model"},
    "opacus": {"client"},
    "torch": {"mtl_model", "client", "server", "simulation"},
}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    names = {name.removeprefix("polyclinic.") for name in names}
    return {name.partition(".")[0] for name in names}


def breaches(room: str, imported: set[str]) -> set[str]:
    walls = (set(MAY_IMPORT) | {"apps", "polyclinic"}) - MAY_IMPORT[room] - {room}
    walls |= {package for package, rooms in KEPT_IN.items() if room not in rooms}
    return imported & walls


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    modules = sorted((ROOT / room).glob("**/*.py"))
    assert modules
    for module in modules:
        assert not breaches(room, imports_of(module)), module


def test_a_shortcut_through_a_wall_is_found() -> None:
    assert breaches("client", {"server", "numpy"}) == {"server"}
    assert breaches("configs", {"torch"}) == {"torch"}
    assert breaches("server", {"opacus"}) == {"opacus"}


@pytest.mark.parametrize("room", ["client", "server"])
def test_flower_is_met_only_where_messages_are(room: str) -> None:
    doors = {"app.py", "records.py"}
    if room == "server":
        doors |= {"federation.py", "rounds.py"}  # its Grid and messages
        doors |= {"central.py", "strategies.py"}  # its arithmetic
        doors.add("superlink.py")  # its SuperLink's own parts, all of them there
    else:
        doors.add("supernode.py")  # its SuperNode's
    for module in (ROOT / room).glob("*.py"):
        if module.name not in doors:
            assert "flwr" not in imports_of(module), module
