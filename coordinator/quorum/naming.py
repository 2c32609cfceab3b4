"""What a record may say of the committee: checked by whoever proposes it, and by whoever votes for it."""

from __future__ import annotations

from collections.abc import Sequence

from ...compression.errors import ConfigError
from ..protocol.identity import public_key_of
from ..protocol.messages import CommitteeEntry, Reseated
from ..protocol.trust.seals import Committee


def check_committee(entry: CommitteeEntry, present: Committee, recovery: bytes) -> None:
    """`present`: which is to vote for it; `recovery`: digest of the run's recovery key, if there is one.

    One change at a time: seats come in, or go, or one takes the place of another. Raises ConfigError.
    """
    for seat in entry.seats:
        public_key_of(seat.peer_id)
    if entry.recovered_with:
        raise ConfigError("a record that the recovery key signs is not voted for")
    if entry.recovery and recovery:
        raise ConfigError("the run has a recovery key, which is set once")
    seats = {seat.peer_id for seat in entry.seats}
    come, gone = seats.difference(present.seats), set(present.seats).difference(seats)
    if come and gone and (len(come), len(gone)) != (1, 1):
        raise ConfigError(
            f"a committee changes step by step: {len(come)} seats would come and {len(gone)} go at once"
        )


def check_reseat(reseat: Sequence[Reseated], entry: CommitteeEntry | None, present: Committee) -> None:
    """`entry`: that the same record names. Raises ConfigError.

    It takes one: the seat has forgotten what it promised to leaders of the present epoch, so their ballots
    must be void when it votes again.
    """
    if not reseat:
        return
    seats = [one.seat for one in reseat]
    if seats != sorted(set(seats)) or not set(seats) <= set(present.seats):
        raise ConfigError("seats that need not rest any more are the committee's, in order, each one once")
    if entry is None:
        raise ConfigError("where a seat need not rest any more, the record names the committee anew")
