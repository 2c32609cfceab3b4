"""The checks that make commits a chain: order, parent and signature. Links and the ledger share them."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ...compression.errors import LedgerCorrupt
from .messages import BadMessage, Commit


class Forked(LedgerCorrupt):
    """A commit with the right round and signature that follows another record than the one that is known."""


class Chain:
    """Follows the commits of one run from any round on.

    `digest` is that of the record of `round`: the run id for round 0. None: not known, as for a node that
    starts from a snapshot; then the signature of the first commit vouches for what is before it.
    """

    def __init__(self, public_key: Ed25519PublicKey, round_: int, digest: bytes | None) -> None:
        self._public_key = public_key
        self.round = round_
        self.digest = digest

    def check(self, commit: Commit) -> None:
        """Accepts the next commit, or raises LedgerCorrupt (Forked, if that is it) and stays where it was."""
        wanted = self.round + 1
        try:
            self._public_key.verify(commit.signature, commit.record)
            body = commit.body
        except InvalidSignature:
            raise LedgerCorrupt(f"record {wanted}: its signature is not the coordinator's") from None
        except BadMessage as e:
            raise LedgerCorrupt(f"record {wanted}: it is no commit: {e}") from e
        if body.round != wanted:
            raise LedgerCorrupt(f"record {wanted}: it says that it is round {body.round}")
        if self.digest is not None and body.parent != self.digest:
            raise Forked(f"record {wanted}: it does not follow record {self.round}")
        self.round, self.digest = wanted, commit.digest


REPAIR_FORK = (
    "The coordinator was restored from an older copy of its state directory and went on without this node's "
    "rounds. Stop the coordinator and restore a copy from before it was restored, or a newer one: nodes give "
    "back the rounds after it. Or give up this node's rounds: start it with an empty --state directory."
)
"""Two records of one round, both signed by this coordinator."""
