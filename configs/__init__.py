"""Settings of runs, sites and federations. Imports no other Polyclinic package, torch or flwr."""

VERSION = "0.1.0"  # the same as in pyproject.toml; needed where the release is not installed


def same_minor(one: str, other: str) -> bool:
    """Whether two versions have the same major and minor number."""
    return one.split(".")[:2] == other.split(".")[:2]
