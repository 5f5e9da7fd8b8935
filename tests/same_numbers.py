"""Compare the weights of three runs between two commits, to show that a refactoring changed none.

``python -m tests.same_numbers COMMIT`` checks COMMIT out into a temporary worktree and runs there
and in this tree, on this machine and with this environment: three rounds on phantoms, the same
stopped after round 1 and resumed, and two rounds of DP-SGD with noise from a fixed seed.
It prints one hash per saved round and exits with 1 if any differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import ROOT

# This runs in either tree, so it must not depend on where a later commit keeps a module.
CHILD = """
import hashlib, importlib, itertools, json, os, sys
from pathlib import Path
import numpy as np
import torch
from safetensors.numpy import load_file

def first(*names):
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError:
            continue
    raise ImportError(names)

RunConfig = first("polyclinic.configs.run:RunConfig", "configs.run:RunConfig")
run = first("polyclinic.server.app:run", "server.app:run")
from apps import client
from tests.conftest import TINY, pretended_task
from tests.memory_grid import MemoryGrid

torch.set_num_threads(1)
plain, keys = np.random.Philox, itertools.count()
np.random.Philox = lambda *given: plain(*given) if given else plain(key=next(keys))

def hashes(folder):
    files = sorted((folder / "checkpoints").glob("round-*.safetensors")) or sys.exit("no rounds")
    return {f.name: digest(load_file(f)) for f in files}

def digest(tensors):
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        whole.update(tensors[name].tobytes())
    return whole.hexdigest()

def train(name, **changes):
    settings = {**TINY, "run.output-dir": sys.argv[1], "run.name": name,
                "rounds.keep-checkpoints": 9, "phantom.examples": 40, **changes}
    config = RunConfig.from_flat(settings)
    with pretended_task():
        return run(MemoryGrid(client, config.to_flat(), 3), config).path

found = {"demo": hashes(train("demo", **{"rounds.count": 3}))}
first_part = train("resumed", **{"rounds.count": 1})
resumed = {"run.resume": str(first_part), "rounds.count": 3}
found["resumed"] = hashes(train("", **resumed))
private = {"privacy.mode": "dp-sgd", "privacy.noise-multiplier": 1.0, "rounds.count": 2,
           "data.split": "independent", "loss.class-weights": "none"}
found["private"] = hashes(train("private", **private))
print(json.dumps(found))
"""


def hashes_of(tree: Path, place: Path) -> dict[str, dict[str, str]]:
    """Run the three trainings with a tree's code and return each round's weight hash by run."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(place / "runs")],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    commit = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "-q", "--detach", before, commit], check=True)
        try:
            old = hashes_of(before, Path(folder) / "old")
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", before], check=True)
        new = hashes_of(ROOT, Path(folder) / "new")
    different = 0
    for run in old:
        for name, digest in old[run].items():
            same = new[run].get(name) == digest
            different += not same
            print(f"{run:8} {name:26} {digest[:16]} {'same' if same else 'DIFFERS'}")
        different += old[run].keys() != new[run].keys()
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
