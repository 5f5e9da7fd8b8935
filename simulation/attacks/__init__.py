"""Attacks on a run: privacy audit and gradient inversion."""
