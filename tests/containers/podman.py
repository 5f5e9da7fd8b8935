"""Build the images with buildah and run them with podman, as root, without a daemon or a hub.

The base image is bootstrapped from the machine's Debian mirror. All layers stay in podman's
storage, so that later builds only rebuild changed ones; `buildah rmi --all` and `buildah prune`
remove them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import yaml

from tests import ROOT

TOOLS = ("buildah", "mmdebstrap", "podman", "runc")  # Debian's packages have the same names
BASE = "localhost/polyclinic-base:bookworm"
# crun, podman's default, needs more rights than some machines that are containers themselves have
PODMAN = ("podman", "--cgroup-manager=cgroupfs", "--runtime=runc")
MOST = 16_384
SETTINGS = "/mnt"
EMPTY = ("/media", "/srv", "/home", "/boot")  # exist in every Debian: mounts leave no trace


def why_no_containers() -> str:
    """Explain why no container can be built and run here; an empty text if one can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "building and running as it is done here wants root"
    build_base()
    try:
        _call(*PODMAN, "run", "--rm", "--init", *limits(), "--network=host", BASE, "true")
    except CommandFailed as error:
        return f"podman cannot run a container here: {error}"
    return ""


class CommandFailed(Exception):
    """A command failed; the message holds the command and the end of its output."""


def build_base() -> None:
    """Build the base image once per machine: Debian's essential packages and its Python 3.11."""
    if subprocess.run([*PODMAN, "image", "exists", BASE]).returncode == 0:
        return
    # libstdc++6, which numpy and torch need, is in python:slim as well, through apt
    packages = "--include=python3,python3-venv,ca-certificates,libstdc++6"
    make = ["mmdebstrap", "--quiet", "--variant=essential", packages, "bookworm", "-"]
    with subprocess.Popen(make, stdout=subprocess.PIPE) as made:
        _call(*PODMAN, "import", "-", BASE, stdin=made.stdout)
    if made.returncode:
        raise CommandFailed(f"{' '.join(make)}: exit status {made.returncode}")


def build(target: str, version: str, folder: Path) -> str:
    """Build one of the Dockerfile's targets and return the image's name.

    Args:
        folder: where pip's settings for the build are written.
    """
    flags = ["--build-arg", f"BASE={BASE}", *_lent_pip_settings(folder)]
    # buildah 1.28 reuses a stage's layers from an earlier build and then mounts nothing of the
    # stage (RUN --mount=from=...); mounting from an image works
    tools = "localhost/polyclinic-build-tools"
    _bud("tools", tools, flags)
    flags += ["--build-context", f"tools=container-image://{tools}"]
    image = f"localhost/polyclinic-{target}:{version}"
    _bud(target, image, [*flags, "--build-arg", f"VERSION={version}"])
    return image


def _bud(target: str, image: str, flags: Sequence[str]) -> None:
    dockerfile = str(ROOT / "docker" / "Dockerfile")
    options = ("--layers", "--isolation=chroot", "--file", dockerfile, "--target", target)
    _call("buildah", "bud", *options, *flags, "--tag", image, str(ROOT))


def _lent_pip_settings(folder: Path) -> list[str]:
    """Return build flags that make pip find packages as on this machine: a secret and mounts.

    A machine may have its own indexes and certificates in files that a build does not see. All
    of them are mounted over empty folders of the base image and leave no trace in a layer.
    """
    folder.mkdir(exist_ok=True)
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    values = {}
    # settings from the environment are listed first and take precedence
    for line in reversed(listed.stdout.splitlines()):
        name, _, quoted = line.partition("=")
        values[name.rpartition(".")[2]] = str(ast.literal_eval(quoted))
    flags = ["--volume", f"{folder}:{SETTINGS}:ro", "--secret", f"id=pip,src={folder / 'pip.conf'}"]
    places = iter(EMPTY)
    lines = ["[global]"]
    for key, value in values.items():
        words = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.is_file():
                shutil.copy(path, folder / f"{key}-{path.name}")
                word = f"{SETTINGS}/{key}-{path.name}"
            elif path.is_absolute() and path.is_dir():
                # an index's pages link to files next to it
                shared = path.parent if "index" in key else path
                place = next(places)
                flags += ["--volume", f"{shared}:{place}:ro"]
                word = word.replace(str(shared), place)
            words.append(word)
        lines.append(f"{key} = {' '.join(words)}")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    return flags


def podman_run_arguments(
    compose: Path,
    variables: Mapping[str, str],
    *options: str,
    network: str = "host",
) -> list[str]:
    """Translate a compose file of one service into `podman run` arguments, up to the image.

    Unknown keys are refused, so that the shipped file is the tested one.

    Args:
        compose: docker/compose.*.yml, or the compose.yml of a kit.
        variables: the values of its .env file.
        options: further options of `podman run`, such as --rm, --detach, --name or --entrypoint.
        network: podman's network; on the host network ports need no publishing.
    """
    text = compose.read_text(encoding="utf-8")
    (service,) = yaml.safe_load(filled_in(text, variables))["services"].values()
    found = [*PODMAN, "run", *limits(), f"--network={network}", *options]
    image = ""
    for key, value in service.items():
        match key:
            case "image":
                image = f"localhost/{value}"
            case "user" | "pids_limit" | "shm_size":
                found.append(f"--{key.replace('_', '-')}={value}")
            case "init":
                found.append(f"--init={str(value).lower()}")
            case "read_only":
                # unlike Docker, podman mounts tmpfs over /run, /tmp and /var/tmp by default
                found += [f"--read-only={str(value).lower()}", "--read-only-tmpfs=false"]
            case "tmpfs" | "cap_drop":
                found += [f"--{key.replace('_', '-')}={each}" for each in value]
            case "security_opt":
                found += [f"--security-opt={each.removesuffix(':true')}" for each in value]
            case "volumes":
                for each in value:
                    source, colon, rest = each.partition(":")
                    source = str(compose.parent.resolve()) if source == "." else source
                    found.append(f"--volume={source}{colon}{rest}")
            case "ports":
                found += [f"--publish={each}" for each in value if network != "host"]
            case "healthcheck":
                # podman's timers need systemd; the tests call `podman healthcheck run NAME`
                command = json.dumps(value["test"][1:])
                found += [f"--health-cmd={command}", "--health-interval=disable"]
            case "restart" | "logging":
                pass  # matters only beyond the length of a test
            case _:
                raise ValueError(f"{compose}: {key}: not known to the tests")
    return [*found, image]


def filled_in(text: str, variables: Mapping[str, str]) -> str:
    """Fill in a compose file's variables as compose does."""

    def value(match: re.Match[str]) -> str:
        name, sign, otherwise = match.groups()
        if variables.get(name):
            return variables[name]
        if sign == ":-":
            return str(otherwise)
        raise ValueError(f"expected the variable {name}")

    return re.sub(r"\$\{(\w+)(:[-?])?([^}]*)\}", value, text)


def limits() -> list[str]:
    """Return flags that limit a container's open files and processes.

    podman asks for a million, and where that is not allowed (on a machine that is a container
    itself) nothing starts. Processes count per user, over all containers.
    """
    found = []
    for name, kind in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(kind)[1]
        limit = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
        found.append(f"--ulimit={name}={limit}:{limit}")
    return found


def _call(*command: str, stdin: IO[bytes] | None = None) -> None:
    done = subprocess.run(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise CommandFailed(f"{' '.join(command)}: exit status {done.returncode}\n{said}")
