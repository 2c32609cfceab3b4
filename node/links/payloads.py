"""A node's payloads in memory: its own, those of the open round, those of commits; where each comes from.

While its round is open a payload is asked of whom the coordinator has named: itself, the peer that made it,
or one that gets it, too, and passes it on. Once it is counted, that is waited for a little longer, or, where
lines are slow, as long as bytes come from there, or the word that it has not come there either; then the
coordinator is asked, and every other member last.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import inf
from typing import Any, BinaryIO, Protocol, get_args

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.blob_streams import Coming, NotServed, Referred, Sink
from ...coordinator.protocol.messages import BadMessage, Commit, Offered, OfferEntry, digest_of
from ...coordinator.protocol.patience import Patience
from ...coordinator.protocol.streams import TrafficKind
from .base import Lied, PayloadRefused, Shelf

AHEAD = 4
"""Commits whose payloads are fetched before the node takes them."""

KEPT_ROUNDS = 64
KEPT_BYTES = 256 * 2**20
"""What stays servable in memory; of more rounds where this node's own second newest verified snapshot is
older."""

SHORT_WAIT_S, LONG_WAIT_S = 0.25, 2.0
"""For what is on its way from a peer from which nothing comes, before the coordinator is asked for it too."""

MOST_WAIT_S = 600.0
LEAST_BYTES_PER_S = 125e3
"""Nothing is waited for longer than so, or than a line of this width takes to give it to all."""

LEAST_SHARE = 0.25
"""A peer from which less comes than this share of what would bring the payload in time gives nothing."""

_ANNOUNCED_S, _AGAIN_S = 1.0, 0.1
"""A payload that is sent here may be ahead of its announcement for so long; and who is asked for one may hear
so much later that it is to pass it on: it is asked again, at first after `_AGAIN_S`."""

QUICK_BYTES = 2**18
"""The digest of so many takes less than to ask a thread for it does."""

_RETRY_S, _LAST_RETRY_S = 0.3, 2.0
_REFUSALS = 2
"""Once is what a session that has just been replaced may answer."""


class Sources(Protocol):
    """Where payloads come from; one attempt each, verified."""

    async def from_coordinator(self, digest: bytes, n_bytes: int, referred: bool = False) -> bytes:
        """`referred`: it may also raise Referred. Raises SwarmUnreachable; NotServed or Lied: asking again is
        of little use."""
        ...

    async def from_member(
        self, holder: str, digest: bytes, n_bytes: int, waits: Callable[[], object] = bool
    ) -> bytes:
        """`waits`: hears whenever the holder says that it waits for the payload itself. Raises
        SwarmUnreachable."""
        ...

    def holders(self, offerer: str | None) -> list[str]:
        """The other members and seats, in the order in which they are to be asked."""
        ...

    def is_coordinator(self, holder: str) -> bool:
        """Whether it is the one that leads: asking it is no detour, and nobody would be quicker."""
        ...

    def rests(self, holder: str) -> bool:
        """Whether fetches from it keep failing, so that there is no use in beginning with it."""
        ...

    def heard_bytes(self, holder: str) -> int:
        """So many have come from it; what has come of this payload and of others."""
        ...

    def too_slow(self, holder: str) -> None:
        """The coordinator was quicker, although it was asked much later."""
        ...

    async def reconnected(self, timeout_s: float) -> None:
        """Returns when the coordinator is connected, or time is up. Raises SwarmUnreachable: given up."""
        ...


class PayloadCache:
    """Payloads of the last rounds in memory, by digest. At most `max_bytes`, but always the newest one.

    `n_bytes`: of all that are in it.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._payloads: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()
        self._newest = 0
        self._keep_after: int | None = None
        self.n_bytes = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._payloads

    def get(self, digest: bytes) -> bytes | None:
        """The payload; None: it is not here."""
        found = self._payloads.get(digest)
        return None if found is None else found[1]

    def add(self, round_: int, digest: bytes, payload: bytes) -> None:
        """`round_`: what it was offered for; what is `KEPT_ROUNDS` older than the newest round goes, unless
        it is to be kept."""
        if digest in self._payloads:
            round_ = max(round_, self._remove(digest))
        self._payloads[digest] = (round_, payload)
        self.n_bytes += len(payload)
        if round_ > self._newest:
            self._newest = round_
            oldest = round_ - KEPT_ROUNDS
            if self._keep_after is not None:
                oldest = min(oldest, self._keep_after)
            for old in [d for d, (r, _) in self._payloads.items() if r <= oldest]:
                self._remove(old)
        while self.n_bytes > self._max_bytes and len(self._payloads) > 1:
            self._remove(next(iter(self._payloads)))

    def keep_after(self, round_: int) -> None:
        """From now on, what was offered for a later round than this one goes for want of room alone."""
        self._keep_after = round_

    def _remove(self, digest: bytes) -> int:
        round_, payload = self._payloads.pop(digest)
        self.n_bytes -= len(payload)
        return round_


@dataclass(slots=True)
class Early:
    """A fetch while the round is open. `waited_s`: when its holder last said that it waits for it, too.
    `is_named`: it comes from whom the coordinator names, and moves on by itself when nothing comes."""

    offered: Offered
    task: asyncio.Task[bytes]
    began_s: float
    is_named: bool = False
    waited_s: float = -inf

    def waits(self) -> None:
        self.waited_s = time.monotonic()


class _Pushed:
    """A payload that the coordinator sends here. See `blob_streams.Sink`."""

    def __init__(self, offered: Offered) -> None:
        self.offered, self.has_begun = offered, False
        self._data = bytearray()
        self._is_over = asyncio.Event()
        self._too_late = asyncio.get_running_loop().call_later(LONG_WAIT_S, self._is_over.set)

    @property
    def is_quick(self) -> bool:
        """Whether its digest is computed in next to no time."""
        return self.offered.n_bytes <= QUICK_BYTES

    async def whole(self) -> bytes:
        """Its bytes. Raises SwarmUnreachable: it does not come."""
        try:
            await self._is_over.wait()
        finally:
            self._too_late.cancel()
        if len(self._data) != self.offered.n_bytes:
            raise SwarmUnreachable("the coordinator does not send what it has announced")
        return bytes(self._data)

    def write(self, chunk: bytes) -> None:
        self.has_begun = True
        self._too_late.cancel()
        self._data += chunk

    def sync(self) -> None:
        """Raises BadMessage: it is another one."""
        if digest_of(bytes(self._data)) != self.offered.digest:
            raise BadMessage(f"payload {self.offered.digest.hex()[:16]}: its bytes do not fit its digest")

    def finish(self) -> int:
        self._is_over.set()
        return len(self._data)

    def abort(self) -> None:
        self._data.clear()
        self.has_begun = True
        self._is_over.set()


class Payloads:
    """Fetches payloads ahead, keeps them, and gives them when they are asked for. One event loop.

    `own`: this node's peer id; `max_offers`, `max_bytes`: what an open round can have.
    """

    def __init__(self, sources: Sources, own: str) -> None:
        self._sources, self._own = sources, own
        self.max_offers, self.max_bytes = 0, 0
        self.kept = PayloadCache()
        self._patience = Patience(floor_s=SHORT_WAIT_S, ceiling_s=MOST_WAIT_S)
        self._early: dict[bytes, Early] = {}
        self._tasks: dict[bytes, tuple[int, asyncio.Task[bytes]]] = {}
        self._pushed: dict[bytes, _Pushed] = {}
        """What the coordinator sends here by itself."""
        self._announced = asyncio.Event()
        """Is set, and another one then, when there is more of it."""
        self.refused: dict[str, int] = dict.fromkeys(get_args(PayloadRefused), 0)
        """Payloads that others sent here, by why they were not taken."""

    def keep_own(self, round_: int, payload: bytes) -> bytes:
        """This node offers it: it need not be fetched, and others may have it. Returns its digest."""
        digest = digest_of(payload)
        self.kept.add(round_, digest, payload)
        return digest

    def offered(self, offered: Offered) -> None:
        """Who has a payload of the open round, or gets it now: fetched from there, silently if that fails, or
        where fetches from there keep failing, from whom the coordinator names instead. To this node, if it is
        named itself, the coordinator sends it."""
        digest, holder = offered.digest, offered.holder
        if digest in self.kept or digest in self._early:
            return
        of_round = sum(early.offered.round == offered.round for early in self._early.values())
        is_full = of_round >= self.max_offers or len(self._early) >= AHEAD * self.max_offers
        if is_full or offered.n_bytes > self.max_bytes:
            return
        if holder == self._own:
            self._pushed[digest] = _Pushed(offered)
            self._announced.set()
            self._announced = asyncio.Event()
        fetching, is_named = _quiet(self._fetch_early(offered)), self._sources.rests(holder)
        self._early[digest] = Early(offered, fetching, time.monotonic(), is_named)

    def early(self, digest: bytes) -> Early | None:
        """For who was told to get it here. What is fetched otherwise is of no use: two nodes would wait for
        each other."""
        return self._early.get(digest)

    def reconnected(self) -> None:
        """What was announced in the session before, and is not here, may never come."""
        for pushed in self._pushed.values():
            pushed.abort()

    async def announced(self, sender: str, digest: bytes) -> None:
        """Returns when that payload may be sent here, or after a moment: the word may be right behind it.
        Raises BadMessage: nobody but the coordinator sends any."""
        if not self._sources.is_coordinator(sender):
            self.refused["sender"] += 1
            raise BadMessage(f"the payload {digest.hex()[:16]} is sent by {sender}, and is to be asked for")
        if digest in self._pushed or digest in self.kept:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANNOUNCED_S):
                while digest not in self._pushed and digest not in self.kept:
                    await self._announced.wait()

    def takes(self, digest: bytes, n_bytes: int) -> Sink | None:
        """Where a payload goes that is sent here; None: it is here, or comes already. Raises BadMessage: it
        was not announced."""
        if digest in self.kept:
            return None
        pushed = self._pushed.get(digest)
        if pushed is None or pushed.offered.n_bytes != n_bytes:
            self.refused["unannounced"] += 1
            raise BadMessage(f"the payload {digest.hex()[:16]} of {n_bytes} bytes was not announced")
        return None if pushed.has_begun else pushed

    def committed(self, commit: Commit) -> None:
        """A round is over: of what was offered only what counted is still of use."""
        counted = {entry.digest for entry in commit.body.offers}
        for digest, early in list(self._early.items()):
            if early.offered.round <= commit.body.round and digest not in counted:
                early.task.cancel()

    def want(self, commits: Sequence[Commit], peers: Mapping[int, str]) -> None:
        """The node has taken the first of these and will take the others next: fetches their payloads.

        It may still have to apply some that it took before: what is under way for them goes on.
        """
        if not commits:
            return
        first, last = commits[0].body.round, commits[-1].body.round
        for digest, (round_, task) in list(self._tasks.items()):
            if (round_ < first and task.done()) or not first - KEPT_ROUNDS < round_ <= last:
                self._tasks.pop(digest)[1].cancel()
        for early in list(self._early.values()):
            if early.offered.round <= first - KEPT_ROUNDS:
                early.task.cancel()
        for commit in commits:
            for entry in commit.body.offers:
                self._ensure(entry, peers.get(entry.peer), commit.body.round)

    async def get(self, entry: OfferEntry, offerer: str | None) -> bytes:
        """A counted payload. Raises SwarmUnreachable: nobody has it."""
        digest = entry.digest
        if digest is None:
            assert entry.payload is not None
            return entry.payload
        kept = self.kept.get(digest)
        if kept is not None:
            return kept
        task = self._under_way(digest)
        if task is None:
            return await self._resolve(digest, entry.n_bytes, offerer)
        return await asyncio.shield(task)

    def most_wait_s(self, n_bytes: int) -> float:
        """For a payload of that size, from when it was asked for."""
        n_copies = len(self._sources.holders(None))
        return min(self._patience.limit_s, max(LONG_WAIT_S, n_copies * n_bytes / LEAST_BYTES_PER_S))

    def close(self) -> None:
        for task in [*(task for _, task in self._tasks.values()), *(e.task for e in self._early.values())]:
            task.cancel()

    # --------------------------------------------------------------------------------------- fetching

    def _ensure(self, entry: OfferEntry, offerer: str | None, round_: int) -> None:
        """A fetch is under way, unless the payload is here. One that has failed is begun again."""
        digest = entry.digest
        if digest is None or digest in self.kept:
            return
        if self._under_way(digest) is None:
            work = self._fetch_wanted(digest, entry.n_bytes, offerer, round_)
            self._tasks[digest] = (round_, _quiet(work))

    def _under_way(self, digest: bytes) -> asyncio.Task[bytes] | None:
        """The fetch of a counted payload; None: it has failed, or was not begun."""
        _, task = self._tasks.get(digest, (0, None))
        return None if task is None or (task.done() and not _has_succeeded(task)) else task

    async def _fetch_early(self, offered: Offered) -> bytes:
        digest, began_s = offered.digest, time.monotonic()
        try:
            if offered.holder == self._own:
                data = await self._pushed[digest].whole()
            elif self._early[digest].is_named:
                data = await self._from_named(offered)
            else:
                data = await self._from_holder(offered, self._early[digest].waits)
            self._patience.took(time.monotonic() - began_s)
            self.kept.add(offered.round, digest, data)
            return data
        finally:
            self._pushed.pop(digest, None)
            early = self._early.get(digest)
            if early is not None and early.task is asyncio.current_task():
                del self._early[digest]

    async def _from_holder(self, offered: Offered, waits: Callable[[], object] = bool) -> bytes:
        """Raises SwarmUnreachable."""
        began_s, pause_s = time.monotonic(), _AGAIN_S
        while True:
            try:
                return await self._sources.from_member(offered.holder, offered.digest, offered.n_bytes, waits)
            except NotServed:
                if time.monotonic() > began_s + _ANNOUNCED_S:
                    raise
            except Lied:
                self.refused["wrong"] += 1
                raise
            await asyncio.sleep(pause_s)
            pause_s *= 2

    async def _fetch_wanted(self, digest: bytes, n_bytes: int, offerer: str | None, round_: int) -> bytes:
        data = self.kept.get(digest)
        if data is None:  # it has not come since this was begun
            data = await self._resolve(digest, n_bytes, offerer)
        self.kept.add(round_, digest, data)
        return data

    async def _resolve(self, digest: bytes, n_bytes: int, offerer: str | None) -> bytes:
        """From what is on its way; where that stands still from whoever has it, whichever comes first."""
        early = self._early.get(digest)
        if early is None:
            return await self._from_anybody(digest, n_bytes, offerer)
        holder = early.offered.holder
        if early.is_named or holder == self._own or self._sources.is_coordinator(holder):
            await asyncio.wait({early.task})
        else:
            await self._wait_while_it_comes(early)
        named = partial(self._from_named, early.offered)
        return await self._raced(early, partial(self._from_anybody, digest, n_bytes, offerer, named))

    async def _from_named(self, offered: Offered) -> bytes:
        """From the coordinator, or whom it names now; where that stands still, too, whichever comes first.
        Raises as the coordinator does."""
        digest, n_bytes = offered.digest, offered.n_bytes
        try:
            return await self._sources.from_coordinator(digest, n_bytes, referred=True)
        except Referred as e:
            named = offered.model_copy(update={"holder": e.holder})
        fetching = _quiet(self._from_holder(named))
        early = Early(named, fetching, time.monotonic())
        try:
            await self._wait_while_it_comes(early)
            return await self._raced(early, partial(self._sources.from_coordinator, digest, n_bytes))
        finally:
            fetching.cancel()

    async def _raced(self, early: Early, other: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
        """What comes first; nothing of `other` is begun where it is here. The reason of `other` if both
        fail."""
        if _has_succeeded(early.task):
            return early.task.result()
        data = await self._race(early.task, _quiet(other()))
        if not early.task.done():
            self.refused["slow"] += 1
            self._sources.too_slow(early.offered.holder)
        return data

    async def _wait_while_it_comes(self, early: Early) -> None:
        """Until it is here, has failed, stands still, or takes longer than those of others did."""
        holder, n_bytes = early.offered.holder, early.offered.n_bytes
        while not early.task.done():
            most_s = self.most_wait_s(n_bytes)
            wait_s, before = min(most_s, LONG_WAIT_S), self._sources.heard_bytes(holder)
            await asyncio.wait({early.task}, timeout=wait_s)
            came, now_s = self._sources.heard_bytes(holder) - before, time.monotonic()
            gives = came >= LEAST_SHARE * n_bytes * wait_s / most_s or early.waited_s > now_s - wait_s
            if not gives or now_s > early.began_s + most_s:
                return

    async def _race(self, early: asyncio.Task[bytes], other: asyncio.Task[bytes]) -> bytes:
        """What comes first; the reason of `other` if both fail."""
        racers = {early, other}
        try:
            while racers:
                done, racers = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if _has_succeeded(task):
                        return task.result()
            return other.result()
        finally:
            early.cancel()
            other.cancel()

    async def _from_anybody(
        self,
        digest: bytes,
        n_bytes: int,
        offerer: str | None,
        named: Callable[[], Coroutine[Any, Any, bytes]] | None = None,
    ) -> bytes:
        """The coordinator, at first as `named` asks it, then every member and seat; again while the
        coordinator may come back."""
        refused, pause_s, why = 0, _RETRY_S, ""
        plain = partial(self._sources.from_coordinator, digest, n_bytes)
        ask = named or plain
        while True:
            try:
                return await ask()
            except (NotServed, Lied) as e:
                refused, why = refused + 1, str(e)
            except SwarmUnreachable as e:
                why = str(e)
            ask = plain
            for holder in self._sources.holders(offerer):
                try:
                    return await self._sources.from_member(holder, digest, n_bytes)
                except SwarmUnreachable:
                    continue
            if refused >= _REFUSALS:
                raise SwarmUnreachable(f"nobody has the payload {digest.hex()[:16]} any more: {why}")
            await asyncio.sleep(pause_s)
            await self._sources.reconnected(_LAST_RETRY_S)
            pause_s = min(2 * pause_s, _LAST_RETRY_S)


class _Given(BytesIO):
    """A payload that is given to somebody; `given` hears its size at the end."""

    def __init__(self, payload: bytes, given: Callable[[int], object]) -> None:
        super().__init__(payload)
        self._at_end = partial(given, len(payload))

    def close(self) -> None:
        if not self.closed:
            self._at_end()
        super().close()


class _PassedOn:
    """See `blob_streams.Coming`: an early fetch of this node's, once it is here. `given`: see `_Given`."""

    def __init__(self, early: Early, given: Callable[[int], object]) -> None:
        self._task, self.n_bytes, self._given = early.task, early.offered.n_bytes, given
        self._payload: BytesIO | None = None

    async def read(self, n_bytes: int) -> bytes:
        """See `blob_streams.Coming`."""
        if self._payload is None:
            await asyncio.wait({self._task})
            if not _has_succeeded(self._task) or len(self._task.result()) != self.n_bytes:
                raise SwarmUnreachable("the payload has not come")
            self._payload = BytesIO(self._task.result())
        return self._payload.read(n_bytes)

    def close(self) -> None:
        """Nobody reads any more."""
        self._given(self.n_bytes)


class Served:
    """What members may fetch from this node: payloads that it has or waits for, and what is on its shelf.

    `rate_bytes_per_s`: of this node's line. As much is given at a time as it sends while others wait, who are
    taken to wait as long as this node does; who is refused goes to the coordinator at once. `payloads`: what
    is on its way to here.
    """

    def __init__(
        self,
        kept: PayloadCache,
        rate_bytes_per_s: float = inf,
        payloads: Payloads | None = None,
    ) -> None:
        self._kept, self._payloads = kept, payloads
        self._rate = rate_bytes_per_s
        self.shelf: Shelf | None = None
        self._n_given = 0
        """Bytes of payloads that are being given."""

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        """See `Shelf.open`; payloads come before what the node has put on its shelf."""
        payload, shelf = self._kept.get(digest), self.shelf
        if payload is not None and self._gives(len(payload)):
            return _Given(payload, self._given), len(payload)
        if payload is not None or shelf is None:
            raise KeyError(digest.hex())
        return shelf.open(digest)

    def coming(self, digest: bytes) -> Coming | None:
        """A payload that is on its way to here."""
        early = None if digest in self._kept else self._early(digest)
        if early is None or not self._gives(early.offered.n_bytes):
            return None
        return _PassedOn(early, self._given)

    def _gives(self, n_bytes: int) -> bool:
        waits_s = LONG_WAIT_S
        if self._payloads is not None:
            waits_s = max(waits_s, self._payloads.most_wait_s(n_bytes))
        if self._n_given + n_bytes > self._rate * waits_s:
            return False
        self._n_given += n_bytes
        return True

    def _given(self, n_bytes: int) -> None:
        self._n_given -= n_bytes

    def purpose(self, digest: bytes) -> TrafficKind:
        """What bytes of this blob count as."""
        is_payload = digest in self._kept or self._early(digest) is not None
        return "payload" if is_payload else "snapshot"

    def _early(self, digest: bytes) -> Early | None:
        return None if self._payloads is None else self._payloads.early(digest)

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        """Where a payload goes that is sent here. Raises BadMessage: nodes take what was announced alone."""
        if self._payloads is None:
            raise BadMessage(f"nothing is stored here ({digest.hex()[:16]}, {n_bytes} bytes)")
        return self._payloads.takes(digest, n_bytes)

    async def announced(self, sender: str, digest: bytes) -> None:
        """Is awaited before `sink`. Raises BadMessage: that peer sends nothing here."""
        if self._payloads is not None:
            await self._payloads.announced(sender, digest)

    def stored(self, digest: bytes) -> None:
        """Nothing more is to be done: see `_Pushed`."""


def _quiet(work: Coroutine[Any, Any, bytes]) -> asyncio.Task[bytes]:
    """A fetch that nobody may ever ask for: its failure is not worth a word."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return task


def _has_succeeded(task: asyncio.Task[bytes]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
