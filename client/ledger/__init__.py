"""Append-only records on the site's disk: privacy budget and outgoing messages."""
