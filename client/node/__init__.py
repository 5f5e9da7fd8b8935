"""Running as a deployed site: start, preflight, keys, status."""
