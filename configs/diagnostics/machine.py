"""What a machine has for a process: disk, memory, shared memory, ports, and what it may write."""

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
MEMORY_WARN = 6.0  # GB; a round with the full-size network
SHM_WARN = 0.25  # GB; torch hands batches over in it


def check_disk(name: str, folder: Path) -> Check:
    """Room on the disk of a folder that may not be there yet."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free / GB
    seen = f"{free:.1f} GB free for {folder}"
    if free < DISK_FAIL:
        return Check(name, "fail", seen, f"make room: {DISK_FAIL:g} GB at least")
    if free < DISK_WARN:
        return Check(name, "warn", seen, f"a long run may need {DISK_WARN:g} GB")
    return ok(name, seen)


def check_writable(name: str, folder: Path) -> Check:
    """Whether this process may write to a folder, by writing."""
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
            f"give the folder to the user that runs this: chown {os.geteuid()}:{os.getegid()} on "
            "the machine that has it, or run as its owner",
        )
    return ok(name, f"{folder} can be written to ({who})")


def check_memory() -> Check:
    """Main memory, or what the container may have of it."""
    total = psutil.virtual_memory().total / GB
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.limit_in_bytes")):
        text = file.read_text().strip() if file.is_file() else "max"
        if text.isdecimal():
            total = min(total, int(text) / GB)
    seen = f"{total:.1f} GB"
    if total < MEMORY_WARN:
        advice = f"the full-size network wants {MEMORY_WARN:g} GB; smaller ones do with less"
        return Check("memory", "warn", seen, advice)
    return ok("memory", seen)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """The size of /dev/shm, which containers often keep at 64 MB."""
    if not folder.is_dir():
        return Check("shm", "warn", f"{folder} is not there", "give the container one (shm_size)")
    size = shutil.disk_usage(folder).total / GB
    seen = f"{size:.2f} GB"
    if size < SHM_WARN:
        return Check("shm", "warn", seen, "set shm_size to 1g where the container is started")
    return ok("shm", seen)


def check_address(name: str, address: str) -> Check:
    """Whether an address as 127.0.0.1:9098 is one, and free."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        return Check(name, "fail", f"{address!r} is no address", "give one as 127.0.0.1:9098")
    return check_port(name, host.strip("[]"), int(port))


def check_port(name: str, host: str, port: int) -> Check:
    """Whether a port is free to listen on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = f"stop what listens on port {port}, or give another one"
            return Check(name, "fail", f"{host}:{port}: {error.strerror}", advice)
    return ok(name, f"{host}:{port} is free")
