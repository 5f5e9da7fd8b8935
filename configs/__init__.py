"""What a run and a site may be told. Nothing of ours is imported here, and neither torch nor flwr."""

VERSION = "0.1.0"  # as in pyproject.toml, for where the release runs without being installed
