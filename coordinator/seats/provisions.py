"""The blobs that a seat must have: what the run needs, what is offered, and what records name.

A leader pushes what nodes bring to the other seats, as soon as it begins to come, and announces it (`Keep`)
to those that do not get it so: they fetch it meanwhile. All say so when they have it (`Keeps`). Who follows,
or looks on, also fetches what records name that it has not got.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Protocol

from ..blobs import BlobStore
from ..ledger import Ledger
from ..protocol.blob_streams import Coming, Sink
from ..protocol.messages import BadMessage, CommitBody, decode_record
from ..quorum.words import Keep, Keeps, Word
from ..serving.passing_on import PassedOn, Stored
from .disk import StateDisk
from .fetching import Fetcher, OpenStream
from .holders import KEPT_ROUNDS, Holders
from .link import Link
from .pushing import STREAMS, PushedTo, Pusher

EARLY: Final = STREAMS - 2
"""So many are passed on while they come, and no more: others must not wait for what is slow to come."""


class Shelf(Protocol):
    """What becomes of blobs that come from other seats, and which of the ledger's payloads are not here."""

    def arrived(self, digest: bytes) -> None:
        """It is in the store."""
        ...

    def missing(self) -> Mapping[bytes, int]:
        """Payloads that are still needed, by the newest round that counts each."""
        ...

    def has_room(self, n_bytes: int) -> bool: ...


class Provisions:
    """Of one seat. `links`: to other seats; `leader`: who leads, as far as is known; `on_held`: is told of a
    payload that enough seats hold now; `on_whole`: when the last payload is here that `waits_for` was told
    of."""

    def __init__(
        self,
        me: str,
        ledger: Ledger,
        blobs: BlobStore,
        disk: StateDisk,
        links: Mapping[str, Link],
        send: Callable[[str, Word], None],
        open_stream: OpenStream,
        leader: Callable[[], str | None],
        shelf: Shelf,
        on_held: Callable[[bytes], None],
        on_whole: Callable[[], None],
    ) -> None:
        self._me, self._ledger, self._blobs, self._disk = me, ledger, blobs, disk
        self._links, self._send, self._leader = links, send, leader
        self._shelf, self._on_held, self._on_whole = shelf, on_held, on_whole
        self._awaited: set[bytes] = set()
        """Payloads without which this seat does not vote for the record that is open."""
        self._pushed: set[bytes] = set()
        """Payloads that the leader is sending here."""
        self.fetcher = Fetcher(blobs, open_stream, self._sources, self._arrived, self._pushed.__contains__)
        self._pusher = Pusher(open_stream, self._source, self.given, self._not_pushed)
        self._holders = Holders(me, blobs, self._tell, send, lambda: list(links))
        self._rounds: dict[bytes, int] = {}
        """Of payloads that are fetched."""
        self._kept: dict[bytes, int] = {}
        """The round in which a leader has said of a payload that it is to be kept, which no record names."""
        self._led_by: str | None = None
        """Who has led last."""
        self._uploads: dict[bytes, int] = {}
        """Payloads that nodes upload to this seat, and their bytes, the oldest first."""
        self._early: set[bytes] = set()
        """Those of them that others have been told of."""
        self._max_bytes = ledger.genesis.limits.max_payload_bytes

    # --------------------------------------------------------------------------------------- who leads

    def new_reign(self) -> None:
        """This seat leads from now on."""
        self._holders.new_reign(self._disk.committee)
        self._pusher.forget_all()
        self._uploads.clear()
        self._early.clear()

    def begins(self, digest: bytes, n_bytes: int) -> None:
        """See `Uploads`, here and below."""
        self._uploads[digest] = n_bytes
        self._announce_uploads()

    def ends(self, digest: bytes, *, is_stored: bool) -> None:
        self._uploads.pop(digest, None)
        self._early.discard(digest)
        if not is_stored:
            for held in self._holders.lost(digest):
                self._on_held(held)
        self._announce_uploads()

    def passes_on(self, digest: bytes) -> bool:
        return digest in self._early and self._leader() == self._me

    def given(self, seat: str, digest: bytes) -> None:
        for held in self._holders.given(seat, digest):
            self._on_held(held)

    def gone(self, seat: str) -> None:
        """It is not connected any more."""
        self._pusher.forget(seat)
        self._holders.gone(seat)

    def _announce_uploads(self) -> None:
        if self._leader() != self._me:  # uploads of a reign that is over still end
            return
        for digest, n_bytes in self._uploads.items():
            if len(self._early) >= EARLY:
                return
            if digest not in self._early:
                self._early.add(digest)
                self._holders.announce(digest, self._disk.head + 1, n_bytes)

    def held(self, digest: bytes) -> bool:
        """Whether enough seats hold it."""
        return self._holders.held(digest, self._disk.head + 1)

    def remind(self, seat: str | None = None) -> None:
        """Says again what this seat, or any, is not known to hold."""
        self._holders.remind(seat, self._pusher.is_pushed)

    def _tell(self, seat: str, word: Keep) -> None:
        """A payload comes: seats of the committee get it, unless too much waits for them already."""
        if seat not in self._disk.committee.seats or not self._pusher.push(seat, word.digest):
            self._send(seat, word)

    def _not_pushed(self, seat: str, digest: bytes) -> None:
        if self._leader() == self._me:
            self._holders.say(seat, digest)

    def _source(self, digest: bytes) -> Coming:
        """See `Pusher`."""
        writer = None if digest in self._blobs else self._blobs.coming(digest)
        if writer is None:
            return Stored(self._blobs, digest)
        return PassedOn(writer, partial(self.passes_on, digest))

    # --------------------------------------------------------------------------------------- words

    def led_by(self, seat: str) -> None:
        """That one leads, or this seat does. Whoever led before may stand still: what comes from there is to
        come from others. Nodes bring to the new one what they brought to the old one, and a record that waits
        for votes was voted for by somebody who holds what it names."""
        if self._led_by not in (None, seat):
            self._pushed.clear()
            self._pusher.forget_all()
            self.fetcher.leave(self._led_by)
        self._led_by = seat

    def keep(self, seat: str, word: Keep) -> str | None:
        """From who leads. Why it is not heard, in a word."""
        if seat not in self._disk.committee.seats:
            return "keep"
        if word.n_bytes > self._max_bytes:
            return "oversized"
        if word.digest in self._blobs:
            self._shelf.arrived(word.digest)
            self._send(seat, Keeps(digest=word.digest))
        elif not self._shelf.has_room(word.n_bytes):
            return "quota"
        else:
            self.fetcher.want(word.digest, word.n_bytes, seat)
            self._kept[word.digest] = self._disk.head + 1
        return None

    def refuses(self, seat: str, digest: bytes, n_bytes: int) -> str | None:
        """Why a payload is not taken that this seat pushes, in a word; None: it is. Only who leads pushes, or
        has announced it."""
        if seat not in self._disk.committee.seats or (seat != self._leader() and digest not in self._kept):
            return "push"
        if n_bytes > self._max_bytes:
            return "oversized"
        return None if digest in self._blobs or self._shelf.has_room(n_bytes) else "quota"

    def take(self, digest: bytes, n_bytes: int) -> Sink | None:
        """Where it goes; None: it is here, or comes already. Raises OSError."""
        if digest in self._blobs or self._blobs.coming(digest) is not None:
            return None
        sink = PushedTo(self._blobs.writer(digest, n_bytes), partial(self._push_ended, digest))
        self._pushed.add(digest)
        return sink

    def taken(self, digest: bytes) -> None:
        """What was pushed is here, unless it comes by another way."""
        if digest in self._blobs:
            self.fetcher.forget([digest])
            self._arrived(digest)

    def _push_ended(self, digest: bytes) -> None:
        self._pushed.discard(digest)
        self.fetcher.wake()

    def keeps(self, seat: str, word: Keeps) -> None:
        """A seat has it."""
        for digest in self._holders.keeps(seat, word.digest):
            self._on_held(digest)

    def proposed(self, record: bytes) -> None:
        """What a record names is needed for a vote."""
        with contextlib.suppress(BadMessage):
            body = decode_record(CommitBody, record)
            if body.round == self._disk.head + 1:
                self._want(body)

    def waits_for(self, record: bytes | None) -> None:
        """This seat was asked for its vote for that record, and could not give it; None: for none."""
        self._awaited.clear()
        if record is not None:
            with contextlib.suppress(BadMessage):
                body = decode_record(CommitBody, record)
                self._want(body)
                self._awaited = {digest for digest in _named(body) if digest not in self._blobs}

    # --------------------------------------------------------------------------------------- records

    def recorded(self, body: CommitBody) -> None:
        """The newest record."""
        self._holders.sealed(body.round)
        self._drop_early()
        self._want(body)
        self._drop_kept(body.round)

    def want_all(self) -> None:
        """What the run needs, and the payloads of records that are not here and that others have."""
        genesis = self._ledger.genesis
        for blob in (genesis.base, genesis.held_out, genesis.corpus):
            if blob is not None:
                self.fetcher.want(blob.digest, blob.n_bytes)
        kept_from = self.kept_from() or 0
        for digest, round_ in self._shelf.missing().items():
            if round_ >= kept_from:
                self._rounds[digest] = round_
                self.fetcher.want(digest, self._max_bytes)

    def kept_from(self) -> int | None:
        """The oldest round whose payloads other seats have; None: none of them is here to say."""
        seats = self._disk.committee.seats
        said = [link.enter.kept_from for link in self._links.values() if link.seat in seats]
        return min(said, default=None)

    def drop_released(self) -> None:
        """Payloads that nobody has any more are not wanted."""
        kept_from = self.kept_from() or 0
        gone = [digest for digest, round_ in self._rounds.items() if round_ < kept_from]
        for digest in gone:
            del self._rounds[digest]
        self.fetcher.forget(gone)

    def _drop_early(self) -> None:
        """What comes for so long that its round is over makes room for others."""
        for digest in [digest for digest in self._early if not self._holders.has_announced(digest)]:
            self._early.discard(digest)
            self._uploads.pop(digest, None)
        self._announce_uploads()

    def _drop_kept(self, round_: int) -> None:
        """What was announced and did not come, and no record has named since, is not wanted any more."""
        old = [digest for digest, came in self._kept.items() if came + KEPT_ROUNDS <= round_]
        for digest in old:
            del self._kept[digest]
        self.fetcher.forget([digest for digest in old if digest not in self._rounds])

    def _want(self, body: CommitBody) -> None:
        for digest in _named(body):
            if digest not in self._blobs:
                self._rounds[digest] = body.round
                self.fetcher.want(digest, self._max_bytes)

    def _arrived(self, digest: bytes) -> None:
        self._rounds.pop(digest, None)
        self._kept.pop(digest, None)
        self._shelf.arrived(digest)
        for seat in self._disk.committee.seats:
            self._send(seat, Keeps(digest=digest))
        if digest in self._awaited:
            self._awaited.discard(digest)
            if not self._awaited:
                self._on_whole()

    async def close(self) -> None:
        self._pusher.forget_all()
        await self.fetcher.close()

    def _sources(self) -> list[str]:
        """Who leads first; who looks on has less."""
        leader, seats = self._leader(), self._disk.committee.seats
        return sorted(self._links, key=lambda seat: (seat != leader, seat not in seats))


def _named(body: CommitBody) -> list[bytes]:
    """Payloads that the record names, and does not hold itself."""
    return [offer.digest for offer in body.offers if offer.digest is not None]
