"""Attacks on training: privacy audit and gradient inversion."""
