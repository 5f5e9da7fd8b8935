"""Differential privacy: DP-SGD, per-unit gradients and their accounting."""
