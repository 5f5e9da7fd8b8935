"""What a run and a site may be told. Imports nothing of ours, no torch, no flwr."""

VERSION = "0.1.0"  # as in pyproject.toml, for where the release runs without being installed
