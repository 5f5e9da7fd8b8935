"""Create a site's private key, which never leaves the site."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from polyclinic.configs.errors import ConfigError
from polyclinic.configs.security.credentials import public_line

FILE = "site.key"


def make_key(folder: Path) -> tuple[Path, str]:
    """Write a new private key, readable by its owner only.

    Returns:
        The key file, and the public key as one line.

    Raises:
        ConfigError: if there is already a key in the folder.
    """
    path = folder / FILE
    key = ec.generate_private_key(ec.SECP384R1())
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    except FileExistsError:
        raise ConfigError(f"{path}: exists already and is not overwritten") from None
    return path, public_line(key.public_key())
