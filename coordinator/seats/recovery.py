"""The recovery key of a run: it alone may name other coordinators when a majority is lost for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ..protocol.identity import load_or_create
from ..protocol.messages import digest_of

KEY_NAME: Final = "recovery-key"


def recovery_key(folder: Path) -> Ed25519PrivateKey:
    """That a state folder has; a new one is written there, mode 0600, if there is none. Raises
    ConfigError."""
    return load_or_create(folder / KEY_NAME)


def raw_public(key: Ed25519PrivateKey) -> bytes:
    """32 bytes, as a record names it."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def recovery_digest(folder: Path) -> bytes:
    """What record 0, or the first record that names a committee, fixes. Raises ConfigError."""
    return digest_of(raw_public(recovery_key(folder)))
