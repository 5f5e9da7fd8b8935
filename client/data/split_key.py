"""The secret key with which a private site divides its patients into splits.

Anyone who knows the key can compute the split of any patient identifier, and anyone who can change
it can move a patient from training to validation. It never leaves the site's state folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from pathlib import Path

from polyclinic.configs.errors import ConfigError

log = logging.getLogger(__name__)

SPLIT_KEY = "split.key"  # file name in a site's state folder
_BYTES = 32


class SplitKeyError(ConfigError):
    """The split key cannot be read or created. The message names its path."""


def split_key(state: Path) -> bytes:
    """Read the site's split key, and create it on first use.

    Args:
        state: the site's state folder, which persists between runs.

    Returns:
        32 random bytes from the operating system.

    Raises:
        SplitKeyError: if the key cannot be read or created, or is damaged. A damaged key is never
            replaced, because a new one would move patients between training and validation.
    """
    path = state / SPLIT_KEY
    try:
        if not path.exists():
            _create(path)
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SplitKeyError(f"{path}: the split key cannot be read or created: {error}") from None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _BYTES:
        raise SplitKeyError(
            f"{path}: expected {2 * _BYTES} hexadecimal digits, got {len(text)} characters "
            "that are not a key; restore the file from a backup. Only delete it if this cohort "
            "has never trained or been evaluated: a new key divides the patients differently"
        )
    return key


def _create(path: Path) -> None:
    """Write a new key atomically, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:  # another process was faster; use its key
            return
    finally:
        os.unlink(draft)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    log.warning("created %s, which divides this site's patients; back it up with the ledger", path)
