"""Preflight checks of a site's connection to the coordinator: DNS, TCP, TLS, clock and proxy."""

from __future__ import annotations

import json
import socket
import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

from cryptography import x509

from polyclinic.configs.diagnostics.checks import Check, ok
from polyclinic.configs.security.credentials import WARN, now_utc, validity_of

ABOUT = "/v1/polyclinic/about"  # public path; polyclinic.server.deployment.site_auth serves it
WAIT_S = 10.0  # longest wait for the coordinator, in seconds
CLOCK_WARN_S = 5.0  # clock difference in seconds from which to warn
CLOCK_FAIL_S = 250.0  # clock difference in seconds from which to fail; Flower's limit is 300 s


@dataclass(frozen=True)
class About:
    """Public information about a coordinator."""

    time: str  # its clock in UTC, ISO 8601
    polyclinic: str  # version
    flwr: str  # version


def resolve(host: str, port: int) -> Check:
    """Check that the server's name resolves to an address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Check(
            "DNS",
            "fail",
            f"{host}: {error.strerror or error}",
            "check the name, and that this machine's name server can resolve it",
        )
    return ok("DNS", f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}")


def connect(host: str, port: int) -> Check:
    """Check that a TCP connection to the server can be opened."""
    try:
        with socket.create_connection((host, port), WAIT_S):
            return ok("route", f"connected to {host}:{port}")
    except OSError as error:
        return Check(
            "route",
            "fail",
            f"{host}:{port}: {error.strerror or error}",
            f"the site's firewall must let this machine open TCP connections to {host}:{port}, "
            "and the coordinator must be running",
        )


def check_tls(host: str, port: int, authority: Path) -> Check:
    """Check that TLS works and that the authority signed the server's certificate.

    Args:
        host: name or IP address of the server.
        port: its port.
        authority: file with the authority's certificate.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority))
        with (
            socket.create_connection((host, port), WAIT_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            der = tls.getpeercert(binary_form=True) or b""
    except ssl.SSLCertVerificationError as error:
        return Check(
            "TLS",
            "fail",
            f"{host}:{port}: {error.verify_message}",
            "this is not the coordinator of the kit, or its certificate must be renewed: ask the "
            "coordinator, and never connect without verification",
        )
    except (OSError, ssl.SSLError) as error:
        return Check(
            "TLS",
            "fail",
            f"{host}:{port}: {error}",
            "something between this machine and the coordinator blocks or intercepts TLS, such as "
            "a proxy",
        )
    validity = validity_of(x509.load_der_x509_certificate(der))
    left = validity.left(now_utc())
    seen = f"the server's certificate is valid until {validity.end:%Y-%m-%d}"
    if left < WARN:
        return Check("TLS", "warn", seen, "the coordinator should renew it soon")
    return ok("TLS", seen)


def ask_about(host: str, port: int, authority: Path) -> About:
    """Query a coordinator's time and versions.

    Raises:
        OSError: if the server cannot be reached or does not answer as a coordinator.
    """
    context = ssl.create_default_context(cafile=str(authority))
    place = f"[{host}]" if ":" in host else host
    request = f"GET {ABOUT} HTTP/1.1\r\nHost: {place}:{port}\r\nConnection: close\r\n\r\n"
    with (
        socket.create_connection((host, port), WAIT_S) as raw,
        context.wrap_socket(raw, server_hostname=host) as tls,
    ):
        tls.sendall(request.encode())
        answer = b""
        while len(answer) < 65536 and (part := tls.recv(4096)):
            answer += part
    _, _, body = answer.partition(b"\r\n\r\n")
    try:
        about = About(**json.loads(body))
        datetime.fromisoformat(about.time).astimezone()
        return about
    except (ValueError, TypeError):
        raise OSError(f"{host}:{port} does not answer as a Polyclinic coordinator") from None


def compare_clocks(about: About) -> Check:
    """Check that this machine's clock agrees with the coordinator's."""
    apart = (now_utc() - datetime.fromisoformat(about.time)).total_seconds()
    seen = f"{abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} the coordinator's"
    advice = "synchronise the clocks of both machines with NTP"
    if abs(apart) > CLOCK_FAIL_S:
        return Check(
            "clock", "fail", seen, f"{advice}; the coordinator refuses signatures this far off"
        )
    if abs(apart) > CLOCK_WARN_S:
        return Check("clock", "warn", seen, advice)
    return ok("clock", seen)


def check_proxy(host: str) -> Check:
    """Check whether the environment sets a proxy for the coordinator."""
    proxy = getproxies().get("https") or getproxies().get("all")
    if proxy is None:
        return ok("proxy", "none is set")
    if proxy_bypass(host):
        return ok("proxy", f"{proxy} is set, but not for {host} (NO_PROXY)")
    return Check(
        "proxy",
        "warn",
        f"{proxy} is set and will be used for {host}",
        f"a proxy that intercepts TLS breaks the connection: add {host} to NO_PROXY, or exempt "
        f"{host} from interception",
    )
