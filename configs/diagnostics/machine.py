"""Preflight checks of a machine: disk space, memory, shared memory, ports and permissions."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import psutil

from polyclinic.configs.diagnostics.checks import Check, ok

GB = 1e9
DISK_FAIL, DISK_WARN = 1.0, 10.0  # GB
MEMORY_WARN = 6.0  # GB; needed for a round with the full-size network
SHM_WARN = 0.25  # GB; PyTorch's data loaders pass batches through shared memory


def check_disk(name: str, folder: Path) -> Check:
    """Check the free disk space for a folder, which need not exist yet."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free / GB
    seen = f"{free:.1f} GB free for {folder}"
    if free < DISK_FAIL:
        return Check(name, "fail", seen, f"free at least {DISK_FAIL:g} GB")
    if free < DISK_WARN:
        return Check(name, "warn", seen, f"a long run may need {DISK_WARN:g} GB")
    return ok(name, seen)


def check_writable(name: str, folder: Path) -> Check:
    """Check that this process can write to a folder, by writing a temporary file."""
    who = f"uid {os.geteuid()}, gid {os.getegid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"polyclinic")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check(
            name,
            "fail",
            f"{folder}: {error.strerror} ({who})",
            f"make this user the owner of the folder (chown {os.geteuid()}:{os.getegid()} on the "
            "machine that has it), or run as its owner",
        )
    return ok(name, f"{folder} is writable ({who})")


def check_memory() -> Check:
    """Check the machine's memory, or the container's memory limit if it is lower."""
    total = psutil.virtual_memory().total / GB
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.limit_in_bytes")):
        text = file.read_text().strip() if file.is_file() else "max"
        if text.isdecimal():
            total = min(total, int(text) / GB)
    seen = f"{total:.1f} GB"
    if total < MEMORY_WARN:
        advice = f"the full-size network needs {MEMORY_WARN:g} GB; smaller ones need less"
        return Check("memory", "warn", seen, advice)
    return ok("memory", seen)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Check the size of /dev/shm, which is 64 MB by default in containers."""
    if not folder.is_dir():
        return Check("shm", "warn", f"{folder} does not exist", "set shm_size of the container")
    size = shutil.disk_usage(folder).total / GB
    seen = f"{size:.2f} GB"
    if size < SHM_WARN:
        return Check("shm", "warn", seen, "set shm_size of the container to 1g")
    return ok("shm", seen)


def check_address(name: str, address: str) -> Check:
    """Check that an address such as 127.0.0.1:9098 is valid and free."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        return Check(
            name, "fail", f"{address!r} is not an address", "use one such as 127.0.0.1:9098"
        )
    return check_port(name, host.strip("[]"), int(port))


def check_port(name: str, host: str, port: int) -> Check:
    """Check that a port is free to listen on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = f"stop the process that listens on port {port}, or use another port"
            return Check(name, "fail", f"{host}:{port}: {error.strerror}", advice)
    return ok(name, f"{host}:{port} is free")
