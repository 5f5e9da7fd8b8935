"""Whether a coordinator can be reached, and what it shows of itself."""

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

ABOUT = "/v1/polyclinic/about"  # answered by polyclinic.server.deployment.superlink to whoever asks
WAIT_S = 10.0
CLOCK_WARN_S = 5.0
CLOCK_FAIL_S = 250.0  # Flower refuses signatures of 300 s or older


@dataclass(frozen=True)
class About:
    """What a coordinator says of itself to anybody."""

    time: str  # UTC
    polyclinic: str
    flwr: str


def resolve(host: str, port: int) -> Check:
    """Whether a server's name has an address."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return Check(
            "DNS",
            "fail",
            f"{host}: {error.strerror or error}",
            "see that the name is right and that this machine's name server knows it",
        )
    return ok("DNS", f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}")


def connect(host: str, port: int) -> Check:
    """Whether a TCP connection can be made."""
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
    """Whether TLS can be begun with a server that an authority vouches for."""
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
            "this is not the coordinator that the kit is of, or its certificate must be renewed: "
            "ask the coordinator; never go on without",
        )
    except (OSError, ssl.SSLError) as error:
        return Check(
            "TLS",
            "fail",
            f"{host}:{port}: {error}",
            "something between here and the coordinator speaks no TLS, or ends it (a proxy?)",
        )
    validity = validity_of(x509.load_der_x509_certificate(der))
    left = validity.left(now_utc())
    seen = f"the server's certificate is good until {validity.end:%Y-%m-%d}"
    if left < WARN:
        return Check("TLS", "warn", seen, "the coordinator should renew it soon")
    return ok("TLS", seen)


def ask_about(host: str, port: int, authority: Path) -> About:
    """Ask a coordinator for its time and versions.

    Raises:
        OSError: if it does not answer in that form.
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
        raise OSError(f"{host}:{port} answers as no coordinator of Polyclinic does") from None


def compare_clocks(about: About) -> Check:
    """Whether this machine's clock is near enough to the coordinator's."""
    apart = (now_utc() - datetime.fromisoformat(about.time)).total_seconds()
    seen = f"{abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} the coordinator's"
    advice = "let both machines set their clocks by NTP"
    if abs(apart) > CLOCK_FAIL_S:
        return Check("clock", "fail", seen, f"{advice}; signatures this far off are refused")
    if abs(apart) > CLOCK_WARN_S:
        return Check("clock", "warn", seen, advice)
    return ok("clock", seen)


def check_proxy(host: str) -> Check:
    """Whether a proxy of the environment stands in the way."""
    proxy = getproxies().get("https") or getproxies().get("all")
    if proxy is None:
        return ok("proxy", "none is set")
    if proxy_bypass(host):
        return ok("proxy", f"{proxy} is set; {host} is excepted (NO_PROXY)")
    return Check(
        "proxy",
        "warn",
        f"{proxy} is set and will be used for {host}",
        f"if the proxy ends TLS, nothing works: add {host} to NO_PROXY, or have it pass {host} "
        "through unopened",
    )
