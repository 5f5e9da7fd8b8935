"""Comparing runs: against local and pooled training, and by privacy."""
