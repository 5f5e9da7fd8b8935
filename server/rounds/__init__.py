"""Rounds of a run: send requests to the sites, check their replies, combine the results."""
