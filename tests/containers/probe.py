"""Print the properties of the container that this runs in, as JSON."""

import contextlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

BUILDERS = ("gcc", "cc", "c++", "g++", "clang", "ld", "as", "make", "pip", "pip3", "uv-build")
TEST_PACKAGES = ("pytest", "mypy", "hypothesis", "monai", "sklearn", "segmentation_models_pytorch")
LEFTOVERS = ("/etc/pip.conf", "/etc/xdg/pip", "/opt/tools", "/src", "/tmp/cache/pip")
LENT = ("/mnt", "/media", "/srv", "/home", "/boot")  # mounted during the build


def writable(folder: str) -> bool:
    with contextlib.suppress(OSError):
        (Path(folder) / "written-by-the-probe").touch()
        return True
    return False


def imported() -> list[str]:
    import flwr
    import torch
    import torchvision

    import polyclinic.client.app
    import polyclinic.server.app

    modules = (polyclinic.client.app, polyclinic.server.app, flwr, torch, torchvision)
    return [str(module.__file__) for module in modules]


status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
mounts = {line.split()[1]: line.split() for line in Path("/proc/mounts").read_text().splitlines()}
print(
    json.dumps(
        {
            "uid": os.getuid(),
            "gid": os.getgid(),
            "capabilities": [status[key] for key in ("CapPrm", "CapEff", "CapBnd", "CapAmb")],
            "no new privileges": status["NoNewPrivs"],
            "writable": [
                folder
                for folder in (
                    *("/", "/etc", "/opt/polyclinic", "/usr", "/var", "/run", "/var/tmp"),
                    *("/etc/polyclinic", "/data", "/tmp", "/dev/shm", "/var/lib/polyclinic"),
                )
                if writable(folder)
            ],
            "tmp": mounts["/tmp"],
            "shm bytes": shutil.disk_usage("/dev/shm").total,
            "imported": imported(),
            "compiled": sum(1 for _ in Path("/opt/polyclinic").rglob("__pycache__/*.pyc")),
            "builders": [name for name in BUILDERS if shutil.which(name)],
            "test packages": [name for name in TEST_PACKAGES if importlib.util.find_spec(name)],
            "leftovers": [name for name in LEFTOVERS if os.path.exists(name)]
            + [str(path) for name in LENT for path in Path(name).glob("*")],
            "sbom": json.loads(Path("/usr/share/polyclinic/sbom.cdx.json").read_text()),
            "environment": dict(os.environ),
        }
    )
)
