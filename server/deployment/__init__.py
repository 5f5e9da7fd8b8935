"""Deployment of a coordinator: certificates, registry, processes and backups."""
