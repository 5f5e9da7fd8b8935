"""Checks of a machine, its network and its services."""
