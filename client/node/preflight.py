"""Check a site before it starts: common causes of failure, each with advice.

``polyclinic site preflight`` prints the checks. ``polyclinic site start`` runs them first and does
not start if a check fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from polyclinic.client.data.manifest import DataError, read_site
from polyclinic.client.data.split_key import SPLIT_KEY, split_key
from polyclinic.client.ledger.budget import LEDGER, read_accounts
from polyclinic.client.ledger.hash_chain import LedgerError
from polyclinic.client.policy.approvals import Approvals
from polyclinic.configs import VERSION, same_minor
from polyclinic.configs.diagnostics.checks import Check, check_validity, ok
from polyclinic.configs.diagnostics.machine import (
    check_address,
    check_disk,
    check_memory,
    check_shared_memory,
    check_writable,
)
from polyclinic.configs.diagnostics.network import (
    ask_about,
    check_proxy,
    check_tls,
    compare_clocks,
    connect,
    resolve,
)
from polyclinic.configs.errors import ConfigError
from polyclinic.configs.schema.data import DataConfig
from polyclinic.configs.schema.site import CoordinatorConfig, SiteConfig, read_site_config
from polyclinic.configs.security.credentials import (
    key_of,
    name_of,
    now_utc,
    public_line,
    read_certificate,
    read_private_key,
    validity_of,
    vouched_for,
)

RegistrationProbe = Callable[[CoordinatorConfig], str]
RENEW = "ask the coordinator for a new kit"
SHOWN = 3  # unusable rows to list by name


def preflight(
    site_file: Path,
    data: DataConfig,
    probe_registration: RegistrationProbe,
    health: str | None = None,
) -> Iterator[Check]:
    """Run all checks in order; a check comes after those that it depends on.

    Args:
        site_file: the site's ``site.yaml``.
        data: settings to read every image with; those of a private site's file take precedence.
        probe_registration: asks the coordinator whether the site's key is registered
            (``client.node.supernode.probe_registration``); only called while the site itself is
            not connected.
        health: address that the health service will listen on; None if the site is running.
    """
    try:
        site = read_site_config(site_file)
    except ConfigError as error:
        yield Check("site.yaml", "fail", str(error), "fix the file")
        return
    yield ok("site.yaml", f"{site_file}: site {site.name}")
    yield from _machine(site, health)
    own = site.data.model_dump() if site.data is not None else {}
    yield from _images(site, data.model_copy(update=own))
    if site.private:
        yield _split(site)
    yield _ledger(site)
    yield _releases(site)
    if site.server is None:
        advice = "copy the section from the kit's site.yaml"
        yield Check("kit", "fail", "site.yaml has no section server", advice)
        return
    kit = list(_kit(site, site.server))
    yield from kit
    yield from _coordinator(
        site.server, probe_registration, any(check.level == "fail" for check in kit)
    )


def _machine(site: SiteConfig, health: str | None) -> Iterator[Check]:
    yield check_writable("state", site.state)
    yield check_disk("disk", site.state)
    yield check_memory()
    yield check_shared_memory()
    yield _gpu()
    if health is not None:
        yield check_address("health port", health)


def _gpu() -> Check:
    """Check the GPU with a small computation."""
    import torch  # takes seconds to import

    if not torch.cuda.is_available():
        return Check(
            "GPU",
            "warn",
            "no usable GPU; the site will train on the CPU",
            "if the machine has a GPU: check that nvidia-smi works inside the container (GPU "
            "overlay of the compose file, NVIDIA container toolkit) and that the driver supports "
            f"CUDA {torch.version.cuda}",
        )
    name = torch.cuda.get_device_name()
    try:
        found = float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
    except RuntimeError as error:
        return Check(
            "GPU",
            "fail",
            f"{name} is visible, but a computation failed: {str(error).splitlines()[0]}",
            "restart the container, then the driver; a reload of the container daemon can detach "
            "the GPU from a container",
        )
    if found != 512.0:
        return Check("GPU", "fail", f"{name} computes wrong results", "replace the card")
    return ok("GPU", f"{name}, CUDA {torch.version.cuda}, torch {torch.__version__}")


def _images(site: SiteConfig, data: DataConfig) -> Iterator[Check]:
    """Read every image and mask the same way as training does."""
    from polyclinic.client.data.dataset import read_or_reason  # imports torch

    try:
        manifest = read_site(site.data_root, site.name)
    except DataError as error:
        yield Check("manifest", "fail", str(error), "docs/data.md describes a site's data folder")
        return
    except OSError as error:
        yield Check(
            "manifest",
            "fail",
            f"{error.filename}: {error.strerror}",
            "give this user read access to the images; mount the folder into the container",
        )
        return
    yield ok("manifest", f"{manifest.path}: {len(manifest.rows)} rows")
    with ThreadPoolExecutor() as pool:
        found = list(
            pool.map(lambda row: _reason(read_or_reason(manifest, row, data)), manifest.rows)
        )
    unusable = [reason for reason in found if reason]
    if len(unusable) == len(manifest.rows):
        level, advice = "fail", "none of the images can be used"
    elif unusable:
        level, advice = "warn", "these rows will be skipped; fix or remove them"
    else:
        yield ok("images", f"all {len(manifest.rows)} can be read")
        return
    more = f" and {len(unusable) - SHOWN} more" if len(unusable) > SHOWN else ""
    seen = f"{len(unusable)} of {len(manifest.rows)} cannot be used: {'; '.join(unusable[:SHOWN])}"
    yield Check("images", "fail" if level == "fail" else "warn", seen + more, advice)


def _reason(read: object) -> str:
    """Keep only the reason why a row cannot be used, so that its pixels are freed at once."""
    return read if isinstance(read, str) else ""


def _split(site: SiteConfig) -> Check:
    """Check a private site's split key without creating it."""
    path = site.state / SPLIT_KEY
    if not path.exists():
        return ok("split", f"{path} will be created with the first message")
    try:
        split_key(site.state)
    except ConfigError as error:
        return Check("split", "fail", str(error), "restore the state folder from a backup")
    return ok("split", f"{path} divides the patients; include it in backups")


def _ledger(site: SiteConfig) -> Check:
    path = site.state / LEDGER
    try:
        account = read_accounts(path).get(site.cohort_name)
    except LedgerError as error:
        advice = "do not train with privacy until the cause is known; keep the file"
        return Check("ledger", "fail", str(error), advice)
    if site.budget is None:
        return ok("ledger", "no budget in site.yaml: only trains without differential privacy")
    if account is None:
        return ok("ledger", f"nothing spent yet of epsilon {site.budget.epsilon:g}")
    left = account.left()
    seen = f"{left:.3g} left of epsilon {site.budget.epsilon:g}"
    if left <= 0:
        return Check("ledger", "warn", seen, "training will be declined; evaluation continues")
    return ok("ledger", seen)


def _releases(site: SiteConfig) -> Check:
    try:
        approved = Approvals(site.state).approved()
    except ConfigError as error:
        return Check("releases", "fail", str(error), "restore the file from a backup")
    if not approved:
        return Check(
            "releases",
            "warn",
            "no release is approved: every request will be declined",
            "to review and approve one, run: polyclinic site approve SITE_YAML RELEASE.fab",
        )
    last = list(approved.values())[-1]
    seen = f"{len(approved)} approved, latest {last.digest[:12]} ({last.version})"
    return ok("releases", seen)


def _kit(site: SiteConfig, server: CoordinatorConfig) -> Iterator[Check]:
    """Check that the kit's certificates and key belong together, and when they expire."""
    try:
        authority = read_certificate(server.ca)
        certificate = read_certificate(server.certificate)
        key = read_private_key(server.key)
    except ConfigError as error:
        yield Check("kit", "fail", str(error), "copy the kit again, with its permissions")
        return
    if public_line(key.public_key()) != public_line(key_of(certificate)):
        seen = f"{server.certificate} does not belong to the key {server.key}"
        yield Check("kit", "fail", seen, f"files of two kits are mixed: {RENEW}")
        return
    if not vouched_for(certificate, authority):
        seen = f"{server.certificate} is not signed by {server.ca}"
        yield Check("kit", "fail", seen, f"files of two kits are mixed: {RENEW}")
        return
    if name_of(certificate) != site.name:
        seen = f"the kit belongs to site {name_of(certificate)}, site.yaml says {site.name}"
        yield Check("kit", "fail", seen, "use the kit's name in site.yaml")
        return
    yield check_validity("kit", validity_of(certificate), now_utc(), RENEW)


def _coordinator(
    server: CoordinatorConfig, probe_registration: RegistrationProbe, kit_failed: bool
) -> Iterator[Check]:
    yield check_proxy(server.address)
    check = resolve(server.address, server.port)
    yield check
    if check.level == "fail":
        return
    check = connect(server.address, server.port)
    yield check
    if check.level == "fail" or not server.ca.is_file():
        return
    check = check_tls(server.address, server.port, server.ca)
    yield check
    if check.level == "fail":
        return
    try:
        about = ask_about(server.address, server.port, server.ca)
    except OSError as error:
        yield Check(
            "versions",
            "fail",
            str(error),
            "the coordinator must be running polyclinic server start",
        )
        return
    yield compare_clocks(about)
    yield _versions(about.polyclinic, about.flwr)
    if kit_failed:
        return
    try:
        refused = probe_registration(server)
    except OSError as error:
        yield Check("key", "fail", str(error), "try again; the coordinator may be restarting")
        return
    if refused:
        yield Check(
            "key",
            "fail",
            f"the coordinator does not accept this site's key: {refused}",
            "the key was never registered, was revoked, or was replaced by a newer kit: ask the "
            "coordinator. If this site is connected, or was until a minute ago, wait",
        )
    else:
        yield ok("key", "registered with the coordinator")


def _versions(polyclinic: str, flwr: str) -> Check:
    own = version("flwr")
    seen = f"site: polyclinic {VERSION}, flwr {own}; coordinator: {polyclinic}, flwr {flwr}"
    if not (same_minor(polyclinic, VERSION) and same_minor(own, flwr)):
        advice = "major and minor versions must be equal: upgrade the older side"
        return Check("versions", "fail", seen, advice)
    return ok("versions", seen)
