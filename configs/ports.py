"""Where each program listens, unless it is told otherwise."""

PUBLIC = 9092  # the coordinator, for sites
CONTROL = 9093  # the coordinator, on loopback, for its own commands
SERVER_HEALTH = "127.0.0.1:9099"
SITE_HEALTH = "127.0.0.1:9098"
