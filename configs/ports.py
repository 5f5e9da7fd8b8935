"""Default ports and addresses of the coordinator and of sites."""

import socket

PUBLIC = 9092  # coordinator: connections of the sites
CONTROL = 9093  # coordinator: commands on the same machine (loopback only)
SERVER_HEALTH = "127.0.0.1:9099"  # coordinator: health service
SITE_HEALTH = "127.0.0.1:9098"  # site: health service


def free_port() -> int:
    """Find a TCP port of the loopback interface that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
