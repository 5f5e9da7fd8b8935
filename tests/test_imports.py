"""Import rules between packages and sub-packages."""

from __future__ import annotations

import ast

import pytest

from tests import ROOT

MAY_IMPORT = {
    "configs": set(),
    "mtl_model": {"configs"},
    "client": {"configs", "mtl_model"},
    "server": {"configs", "mtl_model"},
    "simulation": {"configs", "mtl_model", "client", "server"},
}
# Allowed imports within a package. The package's own modules may import all its sub-packages.
SUB_PACKAGES = {
    "client.data": set(),
    "client.training": {"client.data"},
    "client.policy": {"client.data"},
    "client.privacy": {"client.data", "client.training"},
    "client.ledger": {"client.privacy"},
    "client.node": {"client.data", "client.ledger", "client.policy"},
    "server.runs": set(),
    "server.aggregation": {"server.runs"},
    "server.export": {"server.runs"},
    "server.deployment": {"server.runs"},
    "server.rounds": {"server.aggregation", "server.runs"},
    "configs.schema": set(),
    "configs.security": set(),
    "configs.diagnostics": {"configs.security"},
    "simulation.phantom": set(),
    "simulation.local": {"simulation.phantom"},
    "simulation.attacks": {"simulation.local", "simulation.phantom"},
    "simulation.experiments": {"simulation.local"},
    "simulation.benchmarks": {"simulation.local", "simulation.phantom"},
}
KEPT_IN = {
    "flwr": {"client", "server", "simulation"},
    "monai": {"mtl_model", "simulation"},
    "onnx": {"server"},
    "onnxruntime": {"mtl_model"},
    "opacus": {"client"},
    "torch": {"mtl_model", "client", "server", "simulation"},
}
FLOWER_IN = {
    "client/app.py",
    "client/messages.py",
    "client/node/supernode.py",  # the SuperNode's own parts
    "server/app.py",
    "server/aggregation/central_dp.py",  # Flower's arithmetic
    "server/aggregation/strategies.py",
    "server/deployment/site_auth.py",  # the SuperLink's headers and signatures
    "server/deployment/superlink.py",  # the SuperLink's own parts
    "server/rounds/federation.py",  # messages to the sites
    "server/rounds/grid.py",  # the interface of the Grid
    "server/rounds/loop.py",
    "server/rounds/messages.py",
    "server/rounds/replies.py",  # replies from the Grid
}


def imports_of(source: str) -> set[str]:
    """Return the names that a module imports, ours without the leading ``polyclinic.``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("polyclinic.") for name in names}


def forbidden(package: str, imported: set[str]) -> set[str]:
    """Return the top-level packages among the imports that a package must not import."""
    tops = {name.partition(".")[0] for name in imported}
    walls = (set(MAY_IMPORT) | {"apps", "polyclinic"}) - MAY_IMPORT[package] - {package}
    walls |= {library for library, packages in KEPT_IN.items() if package not in packages}
    return tops & walls


def sub_package_of(name: str) -> str:
    """Return ``client.data`` for ``client.data.splits.place``; "" outside of all sub-packages."""
    return next((sub for sub in SUB_PACKAGES if f"{name}.".startswith(f"{sub}.")), "")


def crossed(module: str, imported: set[str]) -> set[str]:
    """Return imports within a package that its sub-package rules do not allow."""
    package, own = module.partition(".")[0], sub_package_of(module)
    if not own or package == "configs":  # sub-packages of configs may import its own modules
        return set()
    found = {name for name in imported if name.startswith(f"{package}.")}
    return {n for n in found if sub_package_of(n) not in SUB_PACKAGES[own] | {own}}


def modules_of(package: str) -> dict[str, str]:
    """Read the source of every module of a package, by dotted name."""
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    named = {path.relative_to(ROOT).with_suffix(""): path for path in paths}
    return {
        ".".join(name.parts).removesuffix(".__init__"): path.read_text(encoding="utf-8")
        for name, path in named.items()
    }


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_packages_below_it(package: str) -> None:
    for module, source in modules_of(package).items():
        assert not forbidden(package, imports_of(source)), module
        assert not crossed(module, imports_of(source)), module


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_sub_package_has_an_import_rule(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")} - {ROOT / package}
    assert {".".join(f.relative_to(ROOT).parts) for f in folders} == {
        sub for sub in SUB_PACKAGES if sub.startswith(f"{package}.")
    }


def test_forbidden_imports_are_found() -> None:
    assert forbidden("client", {"server.app", "numpy"}) == {"server"}
    assert forbidden("configs", {"torch.nn"}) == {"torch"}
    assert forbidden("server", {"opacus"}) == {"opacus"}
    assert crossed("client.data.splits", {"client.policy.approvals", "client.data.images"}) == {
        "client.policy.approvals"
    }
    assert crossed("client.data.splits", {"client.app"}) == {"client.app"}
    assert not crossed("client.app", {"client.data.splits"})


def test_allowed_imports_make_no_cycle() -> None:
    left = dict(SUB_PACKAGES)
    while ready := [name for name, needed in left.items() if not needed & set(left)]:
        for name in ready:
            del left[name]
    assert not left, "in a cycle"


@pytest.mark.parametrize("package", ["client", "server"])
def test_flower_is_imported_only_by_modules_that_need_it(package: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*.py")
        if {n.partition(".")[0] for n in imports_of(path.read_text())} & {"flwr"}
    }
    assert found == {name for name in FLOWER_IN if name.startswith(package)}


def test_no_module_imports_our_packages_by_their_folder_names() -> None:
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.partition(".")[0] for n in names} & set(MAY_IMPORT), path


def test_no_test_module_imports_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imports_of(path.read_text(encoding="utf-8")):
            assert not any(part.startswith("test_") for part in name.split(".")[1:-1]), path
