"""Phantom hospitals: synthetic images with masks and labels."""
