"""Tests, in folders that mirror the source."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
