"""What a leader tells the others of payloads that nodes have brought, and which seats hold them since."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Final

from ..blobs import BlobStore
from ..protocol.trust.seals import Committee
from ..quorum.holding import Holding
from ..quorum.words import Keep, Word

KEPT_ROUNDS: Final = 2
"""A payload that comes late may be offered again in the next round."""

MAX_BLOBS: Final = 2**14


class Holders:
    """`tell`: a seat is to get a payload, see `announce`; `send`: a word to a seat; `others`: all that are
    connected, onlookers among them."""

    def __init__(
        self,
        me: str,
        blobs: BlobStore,
        tell: Callable[[str, Keep], None],
        send: Callable[[str, Word], None],
        others: Callable[[], Collection[str]],
    ) -> None:
        self._me, self._blobs, self._others = me, blobs, others
        self._tell, self._send = tell, send
        self._holding = Holding((), 1)
        self._at: dict[bytes, set[str]] = {}
        self._announced: dict[bytes, tuple[int, int]] = {}
        """(round in which it came, bytes) by digest."""

    def new_reign(self, committee: Committee) -> None:
        """This seat leads that committee from now on."""
        self._holding = Holding([seat for seat in committee.seats if seat != self._me], committee.need)
        self._at.clear()
        self._announced.clear()

    def announce(self, digest: bytes, round_: int, n_bytes: int | None = None) -> None:
        """It has come here, for an offer of this round: the others are to have it, too. `n_bytes`: of
        what is being uploaded, and can be had meanwhile."""
        stored = self._blobs.size(digest)
        n_bytes = n_bytes if stored is None else stored
        _, said = self._announced.get(digest, (0, -1))
        if n_bytes is None or n_bytes <= said:
            return
        if len(self._announced) >= MAX_BLOBS:
            self._forget(next(iter(self._announced)))
        self._announced[digest] = round_, n_bytes
        self._holding.announce(digest)
        for seat in self._others():
            self._tell(seat, Keep(digest=digest, n_bytes=n_bytes))

    def has_announced(self, digest: bytes) -> bool:
        """Others know that it comes, or has come, for a round that is not long over."""
        return digest in self._announced

    def remind(self, seat: str | None = None, but: Callable[[str, bytes], bool] = lambda *_: False) -> None:
        """Says again what is not known to be there, to this seat or to all: words may be lost. `but`: what is
        on its way."""
        for digest in self._announced:
            for other in self._others() if seat is None else (seat,):
                if not but(other, digest):
                    self.say(other, digest)

    def say(self, seat: str, digest: bytes) -> None:
        """That the payload can be had here, if it is not known to be there."""
        if digest in self._announced and seat not in self._at.get(digest, ()):
            self._send(seat, Keep(digest=digest, n_bytes=self._announced[digest][1]))

    def keeps(self, seat: str, digest: bytes) -> list[bytes]:
        """A seat says that it has it. Returns those that enough seats hold from now on."""
        if digest not in self._announced:
            return []
        self._at.setdefault(digest, set()).add(seat)
        self._holding.answered(seat, digest, time.monotonic())
        return self._holding.keeps(seat, digest)

    def given(self, seat: str, digest: bytes) -> list[bytes]:
        """All of it has left for that seat. Returns those that count as held from now on."""
        _, n_bytes = self._announced.get(digest, (0, 0))
        return self._holding.given(seat, digest, n_bytes, time.monotonic())

    def gone(self, seat: str) -> None:
        """A seat is not connected any more."""
        self._holding.gone(seat)

    def held(self, digest: bytes, round_: int) -> bool:
        """Whether enough seats hold it. What nobody has been told of yet is announced."""
        self.announce(digest, round_)
        return digest in self._blobs and self._holding.is_held(digest)

    def sealed(self, round_: int) -> None:
        """The record of this round: what came for those before it is of no interest any more."""
        self._holding.sealed()
        for digest in [d for d, (came, _) in self._announced.items() if came + KEPT_ROUNDS <= round_]:
            self._forget(digest)

    def lost(self, digest: bytes) -> list[bytes]:
        """Its upload has broken off. Returns those that enough seats hold from now on, where it stood in the
        way."""
        if digest not in self._announced or digest in self._blobs:
            return []
        self._forget(digest)
        return self._holding.lost(digest)

    def _forget(self, digest: bytes) -> None:
        del self._announced[digest]
        self._at.pop(digest, None)
        self._holding.forget(digest)
