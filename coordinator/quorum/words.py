"""What seats say to each other: msgpack lists with a tag, bounded and checked as all messages are."""

from __future__ import annotations

from typing import Annotated, Final, cast

from pydantic import Field

from ..protocol.messages import (
    MAX_SEATS,
    Address,
    BadMessage,
    Count,
    Digest,
    Message,
    Record,
    Round,
    SealBytes,
    Signature,
    Text,
    Time,
    Work,
    decode_message,
)
from ..protocol.trust.seals import Ballot, Sealed

BATCH: Final = 64
"""Sealed records in one message, at most."""

BATCH_BYTES: Final = 2**20
"""Of the records in one message, unless the first alone is longer."""

MAX_RECORD_BYTES: Final = 16 * 2**20
MAX_WORD_BYTES: Final = MAX_RECORD_BYTES + 2**20
"""What a transport has to let pass, and nothing longer: one record, its signatures, and seals."""

RecordBytes = Annotated[bytes, Field(max_length=MAX_RECORD_BYTES)]
Nonce = Annotated[bytes, Field(min_length=16, max_length=16)]


class Word(Message):
    """`head`: the newest sealed round of who speaks."""


class Ping(Word):
    """From a leader, again and again."""

    tag = 1
    ballot: Ballot
    head: Round


class Pong(Word):
    """The answer. `nonce`: of a seat that rests until a record names it; `time_ms`: 0: not told."""

    tag = 2
    n_younger = 1
    ballot: Ballot
    head: Round
    nonce: Nonce | None
    time_ms: Time = 0


class Canvass(Word):
    """May I try to lead? Changes nothing. `highest`: the highest ballot that was seen."""

    tag = 3
    highest: Ballot
    head: Round


class Aye(Word):
    """Nobody leads, as far as is known here."""

    tag = 4
    highest: Ballot


class Prepare(Word):
    """Promise to accept nothing of a lower ballot."""

    tag = 5
    ballot: Ballot
    head: Round


class Accepted(Record):
    """What a seat has voted for last, in the open round."""

    n_younger = 1
    ballot: Ballot
    round: Round
    record: RecordBytes
    work: Work = b""


class Promise(Word):
    """`accepted`: what may have been sealed already, and has to be proposed again; `time_ms`: 0: not told."""

    tag = 6
    n_younger = 1
    ballot: Ballot
    head: Round
    accepted: Accepted | None
    time_ms: Time = 0


class Nack(Word):
    """A higher ballot was promised, or who asked is behind."""

    tag = 7
    promised: Ballot
    head: Round


class Propose(Word):
    """The record of the open round. `work`: the blob that it names."""

    tag = 8
    n_younger = 1
    ballot: Ballot
    round: Round
    record: RecordBytes
    work: Work = b""


class Voted(Word):
    """A seat's vote for it, which is on its disk."""

    tag = 9
    ballot: Ballot
    round: Round
    digest: Digest
    signature: Signature


class Follow(Word):
    """Send me sealed records after this round. The only word that is answered with records."""

    tag = 10
    after: Round


class Batch(Word):
    """Sealed records in order, without a gap. There are more where `head` is higher."""

    tag = 11
    head: Round
    sealed: Annotated[tuple[Sealed, ...], Field(min_length=1, max_length=BATCH)]


class Sealing(Word):
    """To a seat that the record was proposed to: the seal, by round (`head`) and digest. Who has not got the
    record asks for it."""

    tag = 18
    head: Round
    digest: Digest
    seal: SealBytes


class Enter(Word):
    """First on a stream between two seats: who dials tells where it is reached, and that it may be here.

    `secret`: of a seat ticket, for an onlooker; a seat of the committee is known by its key. `wants_seat`: an
    onlooker that is to be named by the next committee record; `lacks`: why it cannot be named yet, in words.
    `kept_from`: payloads of the rounds from there on can be had from it; `begins`: it has no ledger yet;
    `n_seats`, `drops`: what its operator wants of the committee: so many seats, that one not among them (0,
    "": nothing). Both ends say it, and again when something of it changes.
    """

    tag = 12
    n_younger = 4
    run_id: Digest
    secret: Annotated[bytes, Field(max_length=64)]
    addresses: Annotated[tuple[Address, ...], Field(max_length=8)]
    wants_seat: bool
    lacks: Text
    kept_from: Round = 0
    begins: bool = False
    n_seats: Annotated[int, Field(ge=0, le=MAX_SEATS)] = 0
    drops: Annotated[str, Field(max_length=100)] = ""


class Denied(Word):
    """The last one on a stream: why whoever dials is not let in."""

    tag = 16
    why: Text


class Founding(Word):
    """Record 0 and its signature, for who begins."""

    tag = 17
    record: RecordBytes
    signature: Signature


class Keep(Word):
    """From a leader: this payload was offered; fetch it (over a blob stream) and say `Keeps`."""

    tag = 13
    digest: Digest
    n_bytes: Count


class Keeps(Word):
    """The payload is on the disk of who speaks."""

    tag = 14
    digest: Digest


class Memory(Word):
    """From a leader, now and then: what only it has seen and its successor wants to know, in JSON."""

    tag = 15
    packed: Annotated[bytes, Field(max_length=2**20)]


_WORDS: Final = {
    word.tag: word
    for word in (
        Ping,
        Pong,
        Canvass,
        Aye,
        Prepare,
        Promise,
        Nack,
        Propose,
        Voted,
        Follow,
        Batch,
        Sealing,
        Enter,
        Keep,
        Keeps,
        Memory,
        Denied,
        Founding,
    )
}


def decode_word(data: bytes) -> Word:
    """What `encode_message` made of a word. Raises BadMessage for anything but exactly one known word, and
    for what is longer than any."""
    if len(data) > MAX_WORD_BYTES:
        raise BadMessage("a word that is too long")
    return cast("Word", decode_message(data, _WORDS))
