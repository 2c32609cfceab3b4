"""Peers' identities: Ed25519 keys in libp2p's file format, and peer ids that carry the public key.

A libp2p private key is a protobuf message {1: key type, 2: data}; for Ed25519 the data are the 32-byte seed
and the 32-byte public key. A peer id is base58 of an identity multihash (00, length) of the public key's
message, so a signature can be checked with nothing but the signer's peer id.
Source: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from ...compression.errors import ConfigError
from .files import disk_error, write_aside

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_PRIVATE_PREFIX = bytes([0x08, 0x01, 0x12, 64])  # key type Ed25519, then 64 bytes of data
_PUBLIC_PREFIX = bytes([0x08, 0x01, 0x12, 32])  # key type Ed25519, then 32 bytes of data
_MULTIHASH_PREFIX = bytes([0x00, len(_PUBLIC_PREFIX) + 32])  # "identity" hash: the message itself
_PEER_ID_CHARS = 52  # base58 of 38 bytes that begin with 00 24


def new_key() -> Ed25519PrivateKey:
    """A fresh key from the operating system's generator."""
    return Ed25519PrivateKey.generate()


def load_or_create(path: Path) -> Ed25519PrivateKey:
    """The key at `path`; a new one is written there if there is none. Raises ConfigError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        key = new_key()
        save(key, path)
        return key
    except OSError as e:
        raise ConfigError(f"cannot read the identity {path}: {e.strerror}") from e
    return _parse(data, path)


def save(key: Ed25519PrivateKey, path: Path) -> None:
    """Writes the key with mode 0600, aside, to disk, and then under its name. Raises ConfigError."""
    seed = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    try:
        write_aside(path, _PRIVATE_PREFIX + seed + _raw_public(key.public_key()), 0o600)
    except OSError as e:
        raise disk_error(e, path) or ConfigError(f"cannot write the identity {path}: {e.strerror}") from e


def peer_id_of(key: Ed25519PublicKey) -> str:
    """The peer id (12D3Koo...) that belongs to a public key."""
    return _peer_id(_raw_public(key))


def public_key_of(peer_id: str) -> Ed25519PublicKey:
    """The public key inside a peer id. Raises ConfigError for one that carries no Ed25519 key."""
    prefix = _MULTIHASH_PREFIX + _PUBLIC_PREFIX
    data = _from_base58(peer_id) if len(peer_id) == _PEER_ID_CHARS else b""
    if len(data) != len(prefix) + 32 or not data.startswith(prefix):
        raise ConfigError(f"{peer_id[:60]!r} is not the peer id of an Ed25519 key (12D3Koo...)")
    return Ed25519PublicKey.from_public_bytes(data[len(prefix) :])


_known_key = lru_cache(maxsize=4096)(public_key_of)


def is_signed_by(peer_id: str, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` was made with the key of `peer_id`."""
    try:
        _known_key(peer_id).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def peer_id_bytes(peer_id: str) -> bytes:
    """The multihash that a peer id is, of any kind of key; empty for what is not base58."""
    return _from_base58(peer_id)


@lru_cache(maxsize=4096)
def peer_id_text(multihash: bytes) -> str:
    """The peer id of a multihash."""
    return _base58(multihash)


@lru_cache(maxsize=256)
def _peer_id(raw: bytes) -> str:
    return _base58(_MULTIHASH_PREFIX + _PUBLIC_PREFIX + raw)


def _raw_public(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _parse(data: bytes, path: Path) -> Ed25519PrivateKey:
    if len(data) != len(_PRIVATE_PREFIX) + 64 or not data.startswith(_PRIVATE_PREFIX):
        raise ConfigError(f"{path} holds no Ed25519 identity; remove it to get a new one (and a new peer id)")
    seed, public = data[len(_PRIVATE_PREFIX) :][:32], data[-32:]
    key = Ed25519PrivateKey.from_private_bytes(seed)
    if _raw_public(key.public_key()) != public:
        raise ConfigError(f"{path} is damaged: its two halves do not belong together")
    return key


def _base58(data: bytes) -> str:
    value, digits = int.from_bytes(data, "big"), ""
    while value:
        value, rest = divmod(value, 58)
        digits = _ALPHABET[rest] + digits
    n_zero_bytes = len(data) - len(data.lstrip(b"\0"))
    return _ALPHABET[0] * n_zero_bytes + digits


def _from_base58(text: str) -> bytes:
    """Empty for text that is not base58."""
    value = 0
    for char in text:
        digit = _ALPHABET.find(char)
        if digit < 0:
            return b""
        value = value * 58 + digit
    n_zero_bytes = len(text) - len(text.lstrip(_ALPHABET[0]))
    return bytes(n_zero_bytes) + value.to_bytes((value.bit_length() + 7) // 8, "big")
