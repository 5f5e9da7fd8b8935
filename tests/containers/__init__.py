"""Build images and run containers without a Docker daemon or a registry."""
