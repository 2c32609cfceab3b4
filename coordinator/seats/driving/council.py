"""One seat of a run, driven in an event loop: its state machine, its streams, and the blobs that it needs.

`Council` knows no service: `Owner` builds one when this seat leads, and drops it when it does not any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ....compression.errors import ConfigError, LedgerCorrupt, SwarmUnreachable
from ...blobs import BlobStore
from ...ledger import Ledger
from ...protocol.blob_streams import Sink
from ...protocol.figures import short, wall_ms
from ...protocol.messages import BadMessage, CommitBody, SeatEntry, decode_record
from ...protocol.streams import BLOB, Meter, Stream
from ...protocol.transport import Transport
from ...protocol.trust.seals import Sealed
from ...quorum.disk import Records
from ...quorum.events import DiskFailed, Evidence, Leads, NewRecord, Role, SeatEvent, StepsDown
from ...quorum.seat import Seat
from ...quorum.words import Batch, Enter, Follow, Founding, Keep, Keeps, Memory, Ping, Propose, Word
from ...serving.passing_on import Nobody, Uploads
from ..directory import Directory
from ..disk import KeySigner, StateDisk
from ..link import Addresses, Link
from ..naming import Wish
from ..plan import SeatPlan
from ..provisions import Provisions
from ..streams import SeatStreams
from ..watchers import WhoLeads
from .candidates import Candidates
from .owner import Owner
from .telling import Telling

log = logging.getLogger("thinwire.coordinator")

LOOK_EVERY_S: Final = 1.0
MEMORY_EVERY_S: Final = 5.0
OPEN_S: Final = 10.0
MAX_ONLOOKERS: Final = 8
MAX_BEHIND: Final = 3
"""An onlooker that is so many rounds behind may be named: rounds go on meanwhile."""

DISK_PAUSE_S: Final = 5.0
"""A seat whose disk has failed says nothing for so long."""

_LOST_VOTES: Final = "its votes are lost: start it with an empty --state folder, as a new seat"


class Council:
    """Made before the transport is there; `open_on` begins, `close` ends. `folder`: the state folder."""

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        key: Ed25519PrivateKey,
        blobs: BlobStore,
        records: Records,
        owner: Owner,
        who: WhoLeads,
        meter: Meter,
        plan: SeatPlan,
        *,
        is_new: bool,
        rng: random.Random,
    ) -> None:
        self._folder, self._ledger, self._blobs, self._records = folder, ledger, blobs, records
        self._owner, self.plan, self._rng, self._meter = owner, plan, rng, meter
        self._signer = KeySigner(key)
        self.me = self._signer.seat
        self.disk = StateDisk(folder, ledger, self.me, is_new=is_new)
        self.seat = self._new_seat(time.monotonic())
        self.streams = SeatStreams(self.me, self, meter, rng)
        self._directory = Directory(self.me, ledger, plan.places, self._ours)
        self.provisions = Provisions(
            self.me,
            ledger,
            blobs,
            self.disk,
            self.streams.links,
            self._send,
            self._open_blobs,
            lambda: self.seat.leader,
            owner,
            owner.held,
            lambda: self._do(self.seat.vote_again),
        )
        self._unvoted: bytes | None = None
        """The record that this seat would vote for, if it had all that it names."""
        self._memory = b""
        """That was sent last."""
        self.telling = Telling(
            self.me,
            folder,
            plan.timing.patience_s,
            self.disk,
            lambda: self.seat,
            self.streams.links.keys(),
            self.seats,
            who,
        )
        self.candidates = Candidates(
            self.disk, self.streams.links, self._directory, owner, lambda: self.plan.wish
        )
        self.counts: Counter[str] = Counter()
        self.seen_head = 0
        """The newest round that others have."""
        self._transport: Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_settling = self._is_closed = False
        self._verifying: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._said: Enter | None = None
        self._connected: set[str] = set()
        """Of whom it was told."""
        self._memory_s = self._reminded_s = self._stands_still_to_s = 0.0

    def _new_seat(self, now_s: float) -> Seat:
        run_id, records, timing = self._ledger.run_id, self._records, self.plan.timing
        return Seat(
            run_id,
            self._signer,
            self.disk,
            records,
            self._send,
            now_s,
            rng=self._rng,
            timing=timing,
            wall_ms=wall_ms,
        )

    def time_ms(self) -> int:
        """For the record that this seat proposes next, if it leads."""
        return self.seat.time_ms(time.monotonic())

    # ------------------------------------------------------------------------------------ start and stop

    async def open_on(self, transport: Transport) -> None:
        """Again, on another transport, when one has died."""
        self._transport = transport
        await self.streams.open_on(transport)
        self.streams.keep(self._directory.to_dial())
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
            self.provisions.want_all()
            self.settle()

    async def close(self) -> None:
        """May be called twice."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for task in (self._watching, self._verifying) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.provisions.close()
        await self.streams.close()

    # ------------------------------------------------------------------------------------ what is known

    @property
    def leads(self) -> bool:
        return self.seat.role is Role.LEADING

    @property
    def is_seat(self) -> bool:
        """Of the committee; else it looks on."""
        return self.me in self.disk.committee.seats

    @property
    def role(self) -> str:
        """For people."""
        if self.seat.role in (Role.LEADING, Role.RECOVERING):
            return "leads"
        if not self.is_seat:
            return "looks on"
        return "follows" if self.disk.rests is None else "rests"

    def knows(self, peer_id: str) -> bool:
        """Whether a peer is a seat, or looks on."""
        return peer_id in self.disk.committee.seats or peer_id in self.streams.links

    def seats(self) -> tuple[SeatEntry, ...]:
        """Of the committee, with their addresses."""
        return self._directory.seats()

    def addresses(self) -> Addresses:
        """Where this seat is reached, as others are told."""
        return self._ours()[:8]

    def held(self, digest: bytes) -> bool:
        """Whether enough seats hold a payload for a vote."""
        return digest in self._blobs if not self.plan.waits_for_payloads else self.provisions.held(digest)

    def takes(self, seat: str, digest: bytes, n_bytes: int) -> Sink | None:
        """Where a payload goes that another seat pushes; None: nobody need send it. Raises BadMessage: it is
        refused, and counted; OSError."""
        if (why := self.provisions.refuses(seat, digest, n_bytes)) is not None:
            self.counts[why] += 1
            raise BadMessage(f"this seat does not take the payload: {why}")
        return self.provisions.take(digest, n_bytes)

    def taken(self, seat: str, digest: bytes) -> None:
        """See `elsewhere.Pushes`."""
        self.provisions.taken(digest)

    @property
    def uploads(self) -> Uploads:
        """Who hears of what nodes upload to this seat: nobody where payloads stay with who leads."""
        return self.provisions if self.plan.waits_for_payloads else Nobody()

    def wish(self, wish: Wish) -> None:
        """The operator wants the committee to be another one."""
        self.plan = replace(self.plan, wish=wish)
        self._changed.set()

    def adopted(self) -> None:
        """Records have come into the ledger by another way: nodes had them. A reign is over."""
        self.disk.forget()
        self._begin_anew("lost rounds have come back", time.monotonic())
        self.streams.keep(self._directory.to_dial())
        self.settle()

    # ------------------------------------------------------------------------------------ the state machine

    def settle(self) -> None:
        """What has happened to the seat meanwhile has its effect. After a service was asked something."""
        self._do(lambda _now_s: None)

    def _do(self, what: Callable[[float], object]) -> None:
        if self._is_closed:
            return
        if time.monotonic() >= self._stands_still_to_s:
            what(time.monotonic())
            self.seat.tick(time.monotonic())
        if self._is_settling:
            return
        self._is_settling = True
        try:
            while self.seat.events:
                self._happened(self._next_event())
        finally:
            self._is_settling = False
        if self.seat.leader is not None:
            self.provisions.led_by(self.seat.leader)
        if (unvoted := self.seat.unvoted) is not self._unvoted:
            self._unvoted = unvoted
            self.provisions.waits_for(unvoted)
        self._set_timer()
        self.telling.tell_changes()

    def disk_failed(self, error: str) -> None:
        """Found out by whoever wrote beside the seat."""
        self._stand_still(error)
        self.settle()

    def _stand_still(self, error: str) -> None:
        """Its disk has failed: nobody has heard of what could not be written. It begins anew from it."""
        self.telling.trouble = f"this coordinator's disk is full or broken ({error}): it does not vote"
        log.error("%s", self.telling.trouble)
        self.counts["disk"] += 1
        self._stands_still_to_s = time.monotonic() + DISK_PAUSE_S
        self._begin_anew("its disk has failed", self._stands_still_to_s)

    def _begin_anew(self, why: str, now_s: float) -> None:
        """A seat that knows what is on the disk now, and nothing else. A reign is over."""
        old, self.seat = self.seat, self._new_seat(now_s)
        self.seat.events = [event for event in old.events if isinstance(event, NewRecord | Evidence)]
        if old.role in (Role.LEADING, Role.RECOVERING):
            self._owner.steps_down(why)

    def _next_event(self) -> SeatEvent:
        """In their order. But a reign that ends because others have sealed a record ends before it."""
        events = self.seat.events
        ends = next((e for e in events if isinstance(e, StepsDown) and e.why == "behind"), None)
        if ends is not None:
            events.remove(ends)
            return ends
        return events.pop(0)

    def _happened(self, event: SeatEvent) -> None:
        match event:
            case Leads():
                self.telling.trouble = ""
                self.candidates.begin_anew()
                self.provisions.new_reign()
                try:
                    self._owner.leads()
                except ConfigError as e:  # others may
                    log.error("this coordinator was elected and cannot lead: %s", e)
                    self._begin_anew(str(e), time.monotonic())
            case StepsDown(why=why):
                self.candidates.begin_anew()
                self._owner.steps_down(why)
                if why == "the committee has changed" and self.is_seat:
                    self.seat.wake_s = time.monotonic()  # it knows of nobody who leads: why wait
            case NewRecord(round=round_):
                self.telling.trouble = ""
                self._owner.recorded(round_)
                self._recorded(self._ledger.commits(round_ - 1, 1)[0].body)
            case DiskFailed(error=error):
                self._stand_still(error)
            case Evidence(seat=seat, what=what):
                self.counts[what] += 1
                log.error("seat %s has lied or is broken: %s", short(seat), what)

    def _recorded(self, body: CommitBody) -> None:
        self.provisions.recorded(body)
        if body.committee is not None:
            self.candidates.begin_anew()
            seats = ", ".join(short(seat) for seat in self.disk.committee.seats)
            log.info("round %d: the coordinators are now %s", body.round, seats)
            self.streams.keep(self._directory.to_dial())
        if body.committee is not None or body.access is not None:
            self._owner.renewed()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now_s = time.monotonic()
        if not self.is_seat:  # only how it learns what is new
            self.seat.wake_s = min(self.seat.wake_s, now_s + LOOK_EVERY_S)
        wait_s = max(0.001, self.seat.wake_s - now_s, self._stands_still_to_s - now_s)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self.settle)

    def _send(self, seat: str, word: Word) -> None:
        if isinstance(word, Ping):
            self.telling.term = word.ballot
        self.streams.send(seat, word)

    # -------------------------------------------------------------------------------- `streams.Host`

    def enter(self, seat: str) -> Enter:
        """See `streams.Host`, here and below."""
        return Enter(
            run_id=self._ledger.run_id,
            secret=self.plan.secret,  # a newly named seat is not known to all as one yet
            addresses=self.addresses(),
            wants_seat=self.plan.wants_seat and not self.is_seat,
            lacks=self._lacks(),
            kept_from=self._owner.kept_from(),
            n_seats=self.plan.wish.n_seats,
            drops=self.plan.wish.drops,
        )

    def refuses(self, seat: str, enter: Enter) -> str | None:
        if enter.run_id != self._ledger.run_id:
            return "this is a coordinator of another run"
        if seat in self.disk.committee.seats or seat in self._directory.to_dial():
            return None
        if not hmac.compare_digest(enter.secret, self.plan.secret):
            return "the seat ticket is not this run's: see the file seat-ticket of one of its coordinators"
        onlookers = self.streams.links.keys() - set(self.disk.committee.seats)
        if seat not in onlookers and len(onlookers) >= MAX_ONLOOKERS:
            return f"{MAX_ONLOOKERS} coordinators look on already"
        return None

    def up(self, link: Link, *, is_new: bool) -> None:
        seat, enter = link.seat, link.enter
        if self._directory.told(seat, enter.addresses):
            self.streams.keep(self._directory.to_dial())
        if is_new:
            if seat not in self._connected:
                self._connected.add(seat)
                looks_on = "" if seat in self.disk.committee.seats else ": it looks on"
                log.info("seat %s is connected%s", short(seat), looks_on)
            self.provisions.fetcher.look_again()
            self.provisions.remind(seat)
        if enter.begins:
            link.send(Founding(record=self._ledger.genesis_record, signature=self._ledger.genesis_signature))
        if not self.leads:
            self.provisions.want_all()
        self._changed.set()

    def down(self, seat: str) -> None:
        self._connected.discard(seat)
        self.provisions.gone(seat)
        log.info("seat %s is not connected any more", short(seat))
        self.telling.tell()

    def heard(self, seat: str, word: Word) -> None:
        is_seat = seat in self.disk.committee.seats
        head = getattr(word, "head", None)
        if isinstance(head, int) and is_seat:
            self.seen_head = max(self.seen_head, head)
            self.telling.observed.heard(seat, head)
        match word:
            case Keep() if not is_seat:
                return  # who looks on has not heard of this seat yet
            case Keep():
                if (why := self.provisions.keep(seat, word)) is not None:
                    self.counts[why] += 1
                return
            case Keeps():
                self.provisions.keeps(seat, word)
                return
            case Memory(packed=packed):
                if seat == self.seat.leader and not self.leads:
                    self._remember(packed)
                return
            case Batch(sealed=sealed):
                self._recover(seat, sealed)
            case Propose(record=record, work=work) if is_seat:
                self.provisions.proposed(record)
                verifying = self._owner.verify(record, work)
                if verifying is not None:
                    self.seat.hold(seat, word)
                    if self._verifying is None or self._verifying.done():
                        self._verifying = asyncio.create_task(self._receive_verified(seat, word, verifying))
                    return
        self._receive(seat, word)

    def _receive(self, seat: str, word: Word) -> None:
        self._do(lambda now_s: self.seat.receive(seat, word, now_s))
        if isinstance(word, Ping | Propose) and self.seat.leader == seat:
            self.telling.term = word.ballot

    def _remember(self, packed: bytes) -> None:
        try:
            self._owner.remember(packed)
        except BadMessage as e:
            self.counts["memory"] += 1
            log.debug("what a leader remembers is not understood: %s", e)

    async def _receive_verified(self, seat: str, word: Word, verifying: Awaitable[None]) -> None:
        """A record with many signatures, which are checked first: one at a time, it is said again."""
        await verifying
        self._receive(seat, word)

    def _recover(self, seat: str, batch: tuple[Sealed, ...]) -> None:
        """Takes a record that the recovery key has signed: no committee has sealed it."""
        for sealed in batch:
            try:
                body = decode_record(CommitBody, sealed.record)
            except BadMessage:
                return
            if body.round <= self.disk.head:
                continue
            if body.committee is None or not body.committee.recovered_with:
                return
            try:
                self.recover(sealed)
            except LedgerCorrupt as e:
                log.error("seat %s sent a recovery that is none: %s", short(seat), e)
                self.counts["bad recovery"] += 1
                return

    def recover(self, sealed: Sealed) -> None:
        """Another committee, by a record that the recovery key has signed. Raises LedgerCorrupt."""
        try:
            self.disk.append(sealed)
        except OSError as e:
            self._stand_still(str(e))
            return
        log.warning("round %d: the run's recovery key has named another committee", self.disk.head)
        self._begin_anew("the committee has changed", time.monotonic())
        self.seat.events.append(NewRecord(self.disk.head))
        self.settle()

    # ------------------------------------------------------------------------------------ now and then

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._changed.wait()
            self._changed.clear()
            try:
                self._look()
            except Exception:
                log.exception("a coordinator's seat met a fault of ours")
                self.counts["internal"] += 1
                await asyncio.sleep(LOOK_EVERY_S)

    def _look(self) -> None:
        """What depends on time, or on many things at once."""
        said = self.enter("")
        if said != self._said:
            self._said = said
            self.streams.introduce()
        if self.leads:
            self._remind()
            self.candidates.name()
            self._send_memory()
        elif not self.is_seat:
            self._ask()
        self.provisions.drop_released()
        self.telling.tell()

    def _remind(self) -> None:
        """Others of payloads that they are not known to have."""
        now_s = time.monotonic()
        if now_s >= self._reminded_s + LOOK_EVERY_S:
            self._reminded_s = now_s
            self.provisions.remind()

    def _ask(self) -> None:
        """Who looks on asks also those that its ledger does not know as seats yet: theirs may all be gone."""
        others = [seat for seat in self.streams.links if seat not in self.disk.committee.seats]
        if others:
            self._send(self._rng.choice(others), Follow(after=self.disk.head))

    def _send_memory(self) -> None:
        now_s = time.monotonic()
        if now_s < self._memory_s + MEMORY_EVERY_S:
            return
        self._memory_s, packed = now_s, self._owner.memory()
        if packed and packed != self._memory:
            self._memory = packed
            for seat in self.streams.links:
                self._send(seat, Memory(packed=packed))

    def _lacks(self) -> str:
        """Why this seat cannot be named yet; it is of interest only then, and changes with every payload."""
        if self.is_seat:
            return ""
        if self.disk.rests is not None:
            return _LOST_VOTES
        if self.seen_head - self.disk.head > MAX_BEHIND:
            return f"rounds {self.disk.head + 1} to {self.seen_head}"
        if not self._owner.is_ready() or self.provisions.kept_from() is None:
            return "it is not known yet what is missing"
        n_missing = self.provisions.fetcher.n_wanted
        return f"{n_missing} payloads" if n_missing else ""

    def _ours(self) -> Addresses:
        return () if self._transport is None else tuple(self._transport.addresses)

    async def _open_blobs(self, seat: str) -> Stream:
        if self._transport is None:
            raise SwarmUnreachable("this machine's libp2p is not there")
        reader, writer = await self._transport.open_stream(seat, BLOB, OPEN_S)
        return Stream(reader, writer, self._meter)
