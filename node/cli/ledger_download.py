"""A run's records and payloads from its coordinator, several payloads at a time, for `thinwire ledger`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ...compression.errors import SwarmUnreachable, ThinwireError
from ...coordinator.protocol.blob_streams import NotServed
from ...coordinator.protocol.figures import human_seconds
from ...coordinator.protocol.messages import Commit, NodeState, OfferEntry, Welcome
from ...coordinator.protocol.trust.signatures import SIGNATURE_BYTES
from ..system.every import Every
from ..units import human_bytes

if TYPE_CHECKING:
    from ..links.base import Link

log = logging.getLogger("thinwire.node")

TELL_EVERY_S = 5.0
HOLD_EVERY_S = 2.0
"""Between two words to the coordinator about which payloads are still to be read."""

AT_ONCE: Final = 8
"""Payloads that are asked for at once; the link opens fewer streams, and none of them waits for the next."""

AHEAD_BYTES: Final = 64 * 2**20
AHEAD_COMMITS: Final = 256
"""Of these, whichever is reached first, payloads are fetched before they are written."""


class LedgerDownload:
    """What `write_ledger` asks for, in its order: `commits`, and the `payload` of each that they name.

    Memory: payloads of `AHEAD_BYTES`, and one commit's. What has been written is given up at the coordinator,
    which holds all that is to come. Payloads from before `welcome.kept_from` are not asked for.
    """

    def __init__(self, link: Link, welcome: Welcome, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._head, self._kept_from = link, welcome.head_round, welcome.kept_from
        self._clock = clock
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="payload")
        self._ahead: deque[Commit] = deque()
        self._ahead_bytes = 0
        self._fetches: dict[bytes, Future[bytes | None]] = {}
        self._begun: set[bytes] = set()
        self._began_s = clock()
        self._telling, self._holding = Every(TELL_EVERY_S, clock), Every(HOLD_EVERY_S, clock)
        self.n_bytes = 0
        """Of records and payloads, so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=True)

    def commits(self) -> Iterator[Commit]:
        """Up to the head that the session began with. Raises ThinwireError if the link closes before."""
        done = 0
        for commit in self._arriving():
            self._begin(commit)
            while self._ahead_bytes > AHEAD_BYTES or len(self._ahead) > AHEAD_COMMITS:
                done = self._ahead[0].body.round
                yield self._ahead.popleft()
                self._written(done)
        while self._ahead:
            done = self._ahead[0].body.round
            yield self._ahead.popleft()
            self._written(done)
        if done < self._head:
            raise ThinwireError(f"stopped after record {done} of {self._head}: nothing was written")

    def payload(self, digest: bytes) -> bytes | None:
        """Of a commit that `commits` has given. None: nobody has it. Raises SwarmUnreachable."""
        data = self._fetches.pop(digest).result()
        self.n_bytes += len(data or b"")
        return data

    def _arriving(self) -> Iterator[Commit]:
        if self._head == 0:
            return
        for commit in self._link.records(0):
            yield commit
            if commit.body.round == self._head:
                return

    def _begin(self, commit: Commit) -> None:
        """Its payloads are on their way."""
        self._ahead.append(commit)
        for entry in commit.body.offers:
            if entry.digest is not None and entry.digest not in self._begun:
                self._begun.add(entry.digest)
                self._ahead_bytes += entry.n_bytes
                self._fetches[entry.digest] = self._fetch(entry, commit.body.round)
        work = commit.body.work
        if work and work not in self._begun:
            self._begun.add(work)
            n_bytes = SIGNATURE_BYTES * len(commit.body.offers)
            self._fetches[work] = self._pool.submit(self._from_coordinator, work, n_bytes)

    def _fetch(self, entry: OfferEntry, round_: int) -> Future[bytes | None]:
        if round_ >= self._kept_from:
            return self._pool.submit(self._from_anybody, entry)
        gone: Future[bytes | None] = Future()
        gone.set_result(None)
        return gone

    def _from_coordinator(self, digest: bytes, n_bytes: int) -> bytes | None:
        with suppress(NotServed):
            return self._link.fetch(digest, n_bytes)
        return None

    def _from_anybody(self, entry: OfferEntry) -> bytes | None:
        """From the coordinator, else from a node that still has it; None: nobody has."""
        assert entry.digest is not None
        if (data := self._from_coordinator(entry.digest, entry.n_bytes)) is not None:
            return data
        for holder in self._link.members():
            with suppress(SwarmUnreachable):
                return self._link.fetch(entry.digest, entry.n_bytes, holder)
        return None

    def _written(self, round_: int) -> None:
        """The commit and its payloads have been taken: tells people and, less often, the coordinator."""
        self._ahead_bytes = sum(
            entry.n_bytes for c in self._ahead for entry in c.body.offers if entry.digest is not None
        )
        if self._holding.is_due():
            self._link.state(NodeState.JOINING, needs_after=max(round_, self._kept_from - 1))
        if self._telling.is_due():
            took_s = self._clock() - self._began_s
            log.info("%s", progress(round_, self._head, self.n_bytes, took_s))


def progress(done: int, head: int, n_bytes: int, took_s: float) -> str:
    """One line for people; `done` of `head` records are written."""
    left_s = took_s * (head - done) / max(done, 1)
    return f"record {done:,} of {head:,}, {human_bytes(n_bytes)}, about {human_seconds(left_s)} left"


def incomplete(kept_from: int) -> str:
    """Why a ledger cannot be saved whole, from where it can, and what would have kept it."""
    return (
        f"this ledger cannot be whole: payloads of rounds up to {kept_from - 1} have been deleted, as nodes "
        f"need them no more. The file gets all records, and payloads from round {kept_from} on: it can be "
        f'checked, but not replayed from the base weights. [run] keep = "all" in the run file keeps them, in '
        f"the next run; thinwire export gives this run's weights"
    )
