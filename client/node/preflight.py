"""What a site looks at before it starts: everything that fails in practice, with what to do.

``polyclinic site preflight`` prints it; ``polyclinic site start`` looks at all of it first, and
does not start where something fails.
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
from polyclinic.configs import VERSION
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
SHOWN = 3  # rows that cannot be read, by name


def preflight(
    site_file: Path,
    data: DataConfig,
    probe_registration: RegistrationProbe,
    health: str | None = None,
) -> Iterator[Check]:
    """Look at everything, one after the other; what another check needs comes first.

    Args:
        data: settings to read every image with; a private site's own take precedence.
        knock: asks the coordinator whether it takes the site's key
        (``client.node.supernode.knock``);
            only while the site itself is not connected.
        health: where the health service is to listen; None if the site runs already.
    """
    try:
        site = read_site_config(site_file)
    except ConfigError as error:
        yield Check("site.yaml", "fail", str(error), "mend the file")
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
        advice = "take the section from the kit's site.yaml"
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
    """Whether a GPU can be computed on, by computing on it."""
    import torch  # seconds to import

    if not torch.cuda.is_available():
        return Check(
            "GPU",
            "warn",
            "none can be used; the site will train on the CPU",
            "if the machine has one: see that nvidia-smi works inside the container (GPU overlay "
            "of the compose file, NVIDIA container toolkit) and that its driver fits CUDA "
            f"{torch.version.cuda}",
        )
    name = torch.cuda.get_device_name()
    try:
        found = float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
    except RuntimeError as error:
        return Check(
            "GPU",
            "fail",
            f"{name} is there, but does not compute: {str(error).splitlines()[0]}",
            "restart the container, then the driver; a daemon reload can take a container's GPU",
        )
    if found != 512.0:
        return Check("GPU", "fail", f"{name} computes wrongly", "take the card out of service")
    return ok("GPU", f"{name}, CUDA {torch.version.cuda}, torch {torch.__version__}")


def _images(site: SiteConfig, data: DataConfig) -> Iterator[Check]:
    """Every image and mask, read as training reads them."""
    from polyclinic.client.data.dataset import read_or_reason  # brings torch

    try:
        manifest = read_site(site.data_root, site.name)
    except DataError as error:
        yield Check("manifest", "fail", str(error), "docs/data.md says how a site's folder looks")
        return
    except OSError as error:
        yield Check(
            "manifest",
            "fail",
            f"{error.filename}: {error.strerror}",
            "let the user that runs this read the images; mount the folder into the container",
        )
        return
    yield ok("manifest", f"{manifest.path}: {len(manifest.rows)} rows")
    with ThreadPoolExecutor() as pool:
        found = list(
            pool.map(lambda row: _trouble(read_or_reason(manifest, row, data)), manifest.rows)
        )
    unusable = [reason for reason in found if reason]
    if len(unusable) == len(manifest.rows):
        level, advice = "fail", "none of the images can be used"
    elif unusable:
        level, advice = "warn", "these rows will be left out; mend or remove them"
    else:
        yield ok("images", f"all {len(manifest.rows)} can be read")
        return
    more = f" and {len(unusable) - SHOWN} more" if len(unusable) > SHOWN else ""
    seen = f"{len(unusable)} of {len(manifest.rows)} cannot be used: {'; '.join(unusable[:SHOWN])}"
    yield Check("images", "fail" if level == "fail" else "warn", seen + more, advice)


def _trouble(read: object) -> str:
    """Only why a row cannot be used, so that pixels are let go at once."""
    return read if isinstance(read, str) else ""


def _split(site: SiteConfig) -> Check:
    """Check the secret that divides a private site's patients, without creating it."""
    path = site.state / SPLIT_KEY
    if not path.exists():
        return ok("split", f"{path} will be created when the first message arrives")
    try:
        split_key(site.state)
    except ConfigError as error:
        return Check("split", "fail", str(error), "restore the state folder from a backup")
    return ok("split", f"patients are divided by {path}; keep it in the backup")


def _ledger(site: SiteConfig) -> Check:
    path = site.state / LEDGER
    try:
        account = read_accounts(path).get(site.cohort_name)
    except LedgerError as error:
        advice = "nothing is trained with privacy until this is understood; keep the file"
        return Check("ledger", "fail", str(error), advice)
    if site.budget is None:
        return ok("ledger", "no budget in site.yaml: trains without differential privacy alone")
    if account is None:
        return ok("ledger", f"nothing spent yet of epsilon {site.budget.epsilon:g}")
    left = account.left()
    seen = f"{left:.3g} left of epsilon {site.budget.epsilon:g}"
    if left <= 0:
        return Check("ledger", "warn", seen, "training is declined; evaluation goes on")
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
            "none is approved: whatever is asked will be declined",
            "polyclinic site approve SITE_YAML RELEASE.fab shows and approves one",
        )
    last = list(approved.values())[-1]
    return ok("releases", f"{len(approved)} approved, the last {last.digest[:12]} ({last.version})")


def _kit(site: SiteConfig, server: CoordinatorConfig) -> Iterator[Check]:
    """The credentials of the kit: that they fit together, and until when they hold."""
    try:
        authority = read_certificate(server.ca)
        certificate = read_certificate(server.certificate)
        key = read_private_key(server.key)
    except ConfigError as error:
        yield Check("kit", "fail", str(error), "copy the kit again, with its permissions")
        return
    if public_line(key.public_key()) != public_line(key_of(certificate)):
        seen = f"{server.certificate} is not of the key {server.key}"
        yield Check("kit", "fail", seen, f"files of two kits are mixed: {RENEW}")
        return
    if not vouched_for(certificate, authority):
        seen = f"{server.certificate} is not signed by {server.ca}"
        yield Check("kit", "fail", seen, f"files of two kits are mixed: {RENEW}")
        return
    if name_of(certificate) != site.name:
        seen = f"the kit is of site {name_of(certificate)}, site.yaml says {site.name}"
        yield Check("kit", "fail", seen, "give site.yaml the name in the kit")
        return
    yield check_validity("kit", validity_of(certificate), now_utc(), RENEW)


def _coordinator(
    server: CoordinatorConfig, probe_registration: RegistrationProbe, kit_failed: bool
) -> Iterator[Check]:
    yield check_proxy(server.address)
    reached = resolve(server.address, server.port)
    yield reached
    if reached.level == "fail":
        return
    reached = connect(server.address, server.port)
    yield reached
    if reached.level == "fail" or not server.ca.is_file():
        return
    shaken = check_tls(server.address, server.port, server.ca)
    yield shaken
    if shaken.level == "fail":
        return
    try:
        about = ask_about(server.address, server.port, server.ca)
    except OSError as error:
        yield Check(
            "versions", "fail", str(error), "the coordinator must run polyclinic server start"
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
            f"the coordinator does not take this site's key: {refused}",
            "it was never registered, was revoked, or a newer kit replaces this one: ask the "
            "coordinator. If this site is connected already, or was until a minute ago, wait",
        )
    else:
        yield ok("key", "the coordinator knows it")


def _versions(polyclinic: str, flwr: str) -> Check:
    own = version("flwr")
    seen = f"here polyclinic {VERSION}, flwr {own}; coordinator {polyclinic}, flwr {flwr}"
    if (
        polyclinic.split(".")[:2] != VERSION.split(".")[:2]
        or own.split(".")[:2] != flwr.split(".")[:2]
    ):
        advice = "the first two numbers must agree: upgrade the older side"
        return Check("versions", "fail", seen, advice)
    return ok("versions", seen)
