"""Run a deployed site: start, preflight checks, keys and status."""
