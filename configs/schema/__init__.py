"""Schemas of the configuration files."""
