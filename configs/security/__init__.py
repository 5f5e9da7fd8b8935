"""Certificates, keys and releases."""
