"""Aggregation of the sites' weights: averages, strategies, central differential privacy."""
