"""Exporting the finished model."""
