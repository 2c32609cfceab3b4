"""A seat's disk: the ledger, and beside it the votes. And its key."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError
from ..ledger import Ledger
from ..protocol.identity import is_signed_by, peer_id_of
from ..protocol.trust.seals import Committee, Sealed
from ..quorum.disk import VoteState
from ..state import VOTE_NAME
from .votes import Votes

log = logging.getLogger("thinwire.coordinator")

_LOST: Final = (
    "this seat has no record of its votes (a copy of its state folder was restored, say): it rests until the "
    "other seats have let it in again, which they do by themselves once it is up to date"
)


class StateDisk:
    """`SeatDisk` in a coordinator's state folder. `is_new`: its key was made just now, so that it cannot have
    voted. Raises OSError."""

    def __init__(self, folder: Path, ledger: Ledger, seat: str, *, is_new: bool) -> None:
        self._ledger, self._seat = ledger, seat
        self._votes = Votes(folder / VOTE_NAME, ledger.run_id, seat)
        if self._is_alone or (is_new and not self._votes.is_known):
            self._votes.wake()
        elif not self._votes.is_known:
            log.warning("%s", _LOST)
            self._votes.rest()

    @property
    def head(self) -> int:
        """See `SeatDisk`, here and below."""
        return self._ledger.head_round

    @property
    def head_digest(self) -> bytes:
        return self._ledger.head_digest

    @property
    def committee(self) -> Committee:
        return self._ledger.committee

    @property
    def vote(self) -> VoteState:
        return self._votes.vote

    @property
    def rests(self) -> bytes | None:
        return self._votes.rests

    def save_vote(self, vote: VoteState) -> None:
        self._votes.save(vote)

    def append(self, *sealed: Sealed) -> None:
        """Raises LedgerCorrupt for what are not the next records, sealed or signed by the recovery key."""
        was_alone, accepted = self._is_alone, self._votes.vote.accepted
        has_voted = accepted is not None and [accepted.record] == [one.record for one in sealed]
        if was_alone and not has_voted:
            # It was alone when its folder was copied, and others have been named since: what it voted for
            # among them is not known here. Before the record, or a crash would let that be forgotten.
            log.warning("%s", _LOST)
            self._votes.rest()
        try:
            commits = self._ledger.take(*sealed)
        except sqlite3.Error as e:
            raise OSError(f"the ledger cannot be written: {e}") from e
        reseated = [each.nonce for c in commits for each in c.body.reseat if each.seat == self._seat]
        if self._votes.rests is not None and (self._is_alone or self._votes.rests in reseated):
            self._votes.wake()

    def after(self, round_: int, limit: int) -> list[Sealed]:
        return self._ledger.sealed(round_, limit)

    def forget(self) -> None:
        """Records came here by another way than `append`, and may name this seat: it rests, if so."""
        if not self._is_alone and self._seat in self.committee.seats:
            self._votes.rest()

    @property
    def _is_alone(self) -> bool:
        return self.committee.is_only(self._seat)


class KeySigner:
    """`Signer` with this seat's key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.seat = peer_id_of(key.public_key())

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)

    def check(self, seat: str, signature: bytes, data: bytes) -> bool:
        try:
            return is_signed_by(seat, signature, data)
        except ConfigError:  # no peer id
            return False
