"""What a seat must not forget, on its disk: what it has promised and voted for. A file of its own beside the
ledger, which backups leave out.

file    digest (32 bytes) of the rest | msgpack of `_Kept`
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from ..protocol.files import write_aside
from ..protocol.messages import (
    MAX_WORK_BYTES,
    BadMessage,
    Digest,
    PeerId,
    Record,
    Round,
    decode_record,
    digest_of,
    encode_record,
)
from ..protocol.trust.seals import Ballot
from ..quorum.disk import VoteState
from ..quorum.words import Accepted

log = logging.getLogger("thinwire.coordinator")

NONCE_BYTES: Final = 16
MAX_VOTE_BYTES: Final = 16 * 2**20 + MAX_WORK_BYTES + 2**12

_DIGEST_BYTES: Final = 32


class _Kept(Record):
    """`rests`: a nonce, or empty."""

    run_id: Digest
    seat: PeerId
    epoch: Round
    promised: Ballot
    accepted: Accepted | None
    rests: Annotated[bytes, Field(max_length=NONCE_BYTES)]


class Votes:
    """Of one seat in one run. `save` and `rest` are durable when they return, or raise OSError; then what
    stands here is what was there before."""

    def __init__(self, path: Path, run_id: bytes, seat: str) -> None:
        """Reads what is at `path`. `is_known` is False for what is missing, damaged or another's."""
        self._path, self._run_id, self._seat = path, run_id, seat
        self.vote = VoteState()
        self.rests: bytes | None = None
        self.is_known = self._read()

    def save(self, vote: VoteState) -> None:
        """A vote, or a promise."""
        self._write(vote, self.rests)

    def rest(self) -> None:
        """Votes are lost: none is given until a sealed record names a nonce that is fresh."""
        self._write(VoteState(), os.urandom(NONCE_BYTES))

    def wake(self) -> None:
        """A sealed record has named the nonce, or nothing can have been voted for."""
        self._write(self.vote, None)

    def _write(self, vote: VoteState, rests: bytes | None) -> None:
        kept = _Kept(
            run_id=self._run_id,
            seat=self._seat,
            epoch=vote.epoch,
            promised=vote.promised,
            accepted=vote.accepted,
            rests=rests or b"",
        )
        packed = encode_record(kept)
        write_aside(self._path, [digest_of(packed), packed], 0o600)
        self.vote, self.rests, self.is_known = vote, rests, True

    def _read(self) -> bool:
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_VOTE_BYTES + 1)
        except FileNotFoundError:
            return False
        digest, packed = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest_of(packed) != digest:
            log.warning("%s is damaged: this seat has lost its votes", self._path)
            return False
        try:
            kept = decode_record(_Kept, packed)
        except BadMessage as e:
            log.warning("%s is not understood (%s): this seat has lost its votes", self._path, e)
            return False
        if (kept.run_id, kept.seat) != (self._run_id, self._seat):
            log.warning("%s is of another seat or run: this seat has lost its votes", self._path)
            return False
        self.vote = VoteState(kept.epoch, kept.promised, kept.accepted)
        self.rests = kept.rests or None
        return True
