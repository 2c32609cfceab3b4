"""What a coordinator has verified of its ledger, in a file beside it: the next start reads the rest only.

    signature (64 bytes) | msgpack list of the fields of `Checkpoint`

The signature is this node's own, so that nobody else's word is taken. `records` is the digest of every byte
of the records up to it: a start hashes them again, which takes a hundredth of verifying them. What does not
fit, whatever it is, is no checkpoint: all of the ledger is verified then, and what is wrong with it is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, Self

import msgpack
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..protocol.files import write_aside
from ..protocol.trust.signatures import SIGNATURE_BYTES, verifies

MAX_BYTES: Final = 256 * 2**20
_WHAT: Final = b"thinwire checkpoint 1\n"

Rows = Iterable[tuple[bytes, bytes, bytes]]
"""Record, signature and digest, in order."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`round`: the newest one that is verified; `digest`: of its record; `records`: see `Walked`;
    `invitations`: of all peers that the records admit, in the order of their indices; `peers`: digest of
    their peer ids; `derived`: what follows from the records, see `derived.saved`."""

    run_id: bytes
    round: int
    digest: bytes
    records: bytes
    invitations: tuple[str, ...]
    peers: bytes
    derived: bytes

    @classmethod
    def read(cls, path: Path, run_id: bytes, key: Ed25519PublicKey) -> Self | None:
        """None: there is none of this run and node."""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES)
        except OSError:
            return None
        signature, body = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
        if not verifies(key, signature, _WHAT + body):
            return None
        try:
            found = cls(*msgpack.unpackb(body, use_list=False, max_bin_len=MAX_BYTES))
        except (TypeError, ValueError):  # of another version, which has other fields
            return None
        return found if found.run_id == run_id else None

    def write(self, path: Path, key: Ed25519PrivateKey) -> None:
        """Raises OSError."""
        body: bytes = msgpack.packb(astuple(self), use_bin_type=True)
        write_aside(path, key.sign(_WHAT + body) + body, 0o600)


class Walked:
    """A digest of all records so far, as they stand in the table."""

    def __init__(self) -> None:
        self._hash = blake3()
        self.round = 0

    def add(self, rows: Rows) -> None:
        """The next ones."""
        for row in rows:  # a file may have anything in it: TypeError
            self._hash.update(b"".join(row))
            self.round += 1

    @property
    def digest(self) -> bytes:
        """Of all of them."""
        return self._hash.digest()


def digest_of_peers(peers: Mapping[int, str], n: int) -> bytes:
    """Of the first `n` peer ids, by index."""
    return blake3("\n".join(peers.get(i, "") for i in range(n)).encode()).digest()
