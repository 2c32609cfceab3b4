"""One coordinator of several: its process, which can be killed at any edge, and its disk."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.simulation.peer import End, Wire
from thinwire.compression.errors import ConfigError, SwarmUnreachable, ThinwireError
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    Commit,
    Follow,
    Hello,
    Members,
    Message,
    Notice,
    Offered,
    Refused,
    SeatEntry,
)
from thinwire.coordinator.protocol.trust.seals import Sealed
from thinwire.coordinator.quorum.checking import RecordChecks
from thinwire.coordinator.quorum.disk import VoteState
from thinwire.coordinator.quorum.holding import Holding
from thinwire.coordinator.quorum.recollection import Recollection
from thinwire.coordinator.quorum.replicated import Replicated
from thinwire.coordinator.quorum.seat import Evidence, Leads, NewRecord, Seat, StepsDown, Timing
from thinwire.coordinator.quorum.words import Keep, Keeps, Memory, Word
from thinwire.coordinator.seats.disk import KeySigner, StateDisk
from thinwire.coordinator.service import Service

TIMING = Timing(beat_s=0.2, patience_s=1.0, retry_s=0.3)
MEMORY_EVERY_S = 1.0
IN_FLIGHT = 4


class PowerCut(BaseException):
    """The process ends here and now."""


class Surroundings(Protocol):
    """What a host sees of its world."""

    now_s: float

    def post(self, sender: str, to: str, word: Word) -> None: ...

    def fetch(self, host: SeatHost, digest: bytes, n_bytes: int) -> None: ...

    def sealed(self, host: SeatHost, commit: Commit) -> None: ...


class SparkingDisk(StateDisk):
    """Power may fail before and after everything that is written."""

    spark: Callable[[], None]

    def save_vote(self, vote: VoteState) -> None:
        self.spark()
        super().save_vote(vote)
        self.spark()

    def append(self, *sealed: Sealed) -> None:
        self.spark()
        super().append(*sealed)
        self.spark()


class SeatHost:
    def __init__(
        self, world: Surroundings, folder: Path, key: Ed25519PrivateKey, skew_ms: int, rng: random.Random
    ) -> None:
        self.world, self.folder, self.key, self.rng = world, folder, key, rng
        self.name = peer_id_of(key.public_key())
        self.entry = SeatEntry(peer_id=self.name, addresses=())
        self._skew_ms = skew_ms
        self.is_up = self.is_frozen = False
        self.fuse: int | None = None
        """After so many more chances the power is cut."""
        self.reigns = 0
        self.bug: str | None = None
        """What is wrong with it, see `seats.BUGS`."""
        self._has_run = False
        self._numbers = count(1)

    # ------------------------------------------------------------------------------------- the process

    def boot(self, *, is_restored: bool = False) -> None:
        """From what is on the disk. `is_restored`: without its votes, as from a copy."""
        if is_restored:
            (self.folder / "vote").unlink(missing_ok=True)
        self.ledger = Ledger.open(self.folder / "ledger.db", self.key.public_key())
        self.blobs = BlobStore(self.folder / "blobs")
        self.recollection = Recollection(self.ledger, self.blobs)
        needs_payloads = self.bug != "votes_blindly"
        self.checks = RecordChecks(
            self.ledger, self.blobs, self.recollection, self._wall_ms, needs_payloads=needs_payloads
        )
        self.disk = SparkingDisk(self.folder, self.ledger, self.name, is_new=not self._has_run)
        self.disk.spark = self.spark
        self._has_run = True
        self.service: Service | None = None
        self.log: Replicated | None = None
        self.sessions: dict[str, Wire] = {}
        self.wires: list[Wire] = []
        self._memory_s = self._fetch_s = 0.0
        self.seat = Seat(
            self.ledger.run_id,
            KeySigner(self.key),
            self.disk,
            self.checks,
            self._send_word,
            self.world.now_s,
            rng=random.Random(self.rng.random()),
            timing=TIMING,
        )
        self.is_up, self.is_frozen, self.fuse = True, False, None

    def _wall_ms(self) -> int:
        return max(1, int(self.world.now_s * 1000) + self._skew_ms)

    def crash(self) -> None:
        """What it has sent is still on its way."""
        self.is_up = self.is_frozen = False
        self.fuse, self.service = None, None
        self.ledger.close()
        for wire in self.wires:
            wire.is_closed = True
            wire.down.append(End())
        self.wires, self.sessions = [], {}

    def spark(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise PowerCut

    @contextmanager
    def awake(self) -> Any:
        """What is done to the process; and what follows from it."""
        try:
            yield
            self._settle()
        except PowerCut:
            self.crash()

    def _settle(self) -> None:
        now_s = self.world.now_s
        if self.service is not None:
            self.service.tick(now_s)
        self.seat.tick(now_s)
        while self.seat.events:
            behind = next((e for e in self.seat.events if e == StepsDown("behind")), self.seat.events[0])
            self.seat.events.remove(behind)  # such a reign ends before the records that end it
            match behind:
                case Leads():
                    self._lead()
                case StepsDown():
                    self._step_down()
                case NewRecord(round_):
                    self._recorded(round_)
                case Evidence(seat, what):
                    raise AssertionError(f"{what} by {seat}, and nobody lies")
            if self.service is not None:
                self.service.tick(now_s)

    # ------------------------------------------------------------------------------------------- reigns

    def _lead(self) -> None:
        self.reigns += 1
        committee = self.ledger.committee
        self.holding = Holding([s for s in committee.seats if s != self.name], committee.need)
        self.log = Replicated(self.seat, self.ledger, self.checks)
        self.service = Service(
            ledger=self.ledger,
            blobs=self.blobs,
            key=self.key,
            token="secret" if self.ledger.head_round == 0 else "only the ledger knows",
            send=self._send,
            on_commit=lambda _round: self.spark(),
            now_s=self.world.now_s,
            wall_ms=self._wall_ms,
            log=self.log,
            recollection=self.recollection,
            held=(lambda _digest: True) if self.bug == "votes_blindly" else self.holding.is_held,
        )

    def _step_down(self) -> None:
        if self.service is None:
            return
        self.recollection.reign_ended(self.service.memory())
        self.service = None
        self.recollection.catch_up()
        for wire in self.wires:
            wire.down.extend([Refused.of(SwarmUnreachable("another leads")), End()])
            wire.is_closed = True
        self.wires, self.sessions = [], {}

    def _recorded(self, round_: int) -> None:
        (commit,) = self.ledger.commits(round_ - 1, 1)
        self.world.sealed(self, commit)
        if self.service is not None and self.log is not None:
            self.holding.sealed()
            self.log.new_record(round_, self.world.now_s)
        elif self.recollection.head < round_ and (self.bug != "skips_a_commit" or round_ % 4):
            self.recollection.feed(commit)

    # ------------------------------------------------------------------------------------ other seats

    def _send_word(self, seat: str, word: Word) -> None:
        self.spark()
        self.world.post(self.name, seat, word)

    def receive(self, seat: str, word: Word) -> None:
        match word:
            case Keep(digest=digest, n_bytes=n_bytes):
                if digest in self.blobs:
                    self._send_word(seat, Keeps(digest=digest))
                else:
                    self.world.fetch(self, digest, n_bytes)
            case Keeps(digest=digest):
                if self.service is not None:
                    for held in self.holding.keeps(seat, digest):
                        self.service.held_arrived(held, self.world.now_s)
            case Memory(packed=packed):
                if self.service is None:
                    self.recollection.remember(packed)
            case _:
                self.seat.receive(seat, word, self.world.now_s)

    def fetched(self, payload: bytes, digest: bytes) -> None:
        """A payload has come from another seat."""
        if digest not in self.blobs:
            self.spark()
            self.blobs.put(digest, payload)
        self.spark()
        self.recollection.payload_arrived(digest)
        self.seat.vote_again(self.world.now_s)
        if self.seat.leader is not None:
            self._send_word(self.seat.leader, Keeps(digest=digest))

    def pass_time(self) -> None:
        """Now and then a leader tells what it has seen, and a follower looks for what is missing."""
        now_s, others = self.world.now_s, [s for s in self.ledger.committee.seats if s != self.name]
        if self.service is not None and now_s >= self._memory_s + MEMORY_EVERY_S:
            self._memory_s = now_s
            memory = Memory(packed=self.service.memory())
            for seat in others:
                self._send_word(seat, memory)
        if now_s >= self._fetch_s + 1.0:
            self._fetch_s = now_s
            for digest in list(self.recollection.missing_payloads())[:8]:
                self.world.fetch(self, digest, 0)

    # ------------------------------------------------------------------------------------------- nodes

    def _send(self, peer_id: str, message: Message) -> None:
        self.spark()
        wire = self.sessions.get(peer_id)
        if wire is not None and not isinstance(message, Offered | Members | Notice):
            wire.down.append(message)

    def deliver_up(self, wire: Wire) -> None:
        """One message from a node."""
        message = wire.up.popleft()
        try:
            if isinstance(message, End):
                self.close(wire)
            elif isinstance(message, Hello):
                self._hello(wire, message)
            elif isinstance(message, Follow):
                wire.follows = message.after
            elif self.service is not None:
                self.service.receive(wire.peer.name, wire.number, message, self.world.now_s)
        except ThinwireError as e:
            wire.down.append(Refused.of(e))
            self.close(wire)

    def _hello(self, wire: Wire, hello: Hello) -> None:
        if self.service is None or hello.is_ahead_of(self.service.head):
            raise SwarmUnreachable("another seat leads")
        name, number = wire.peer.name, next(self._numbers)
        welcome = self.service.open(name, number, hello, self.world.now_s)
        old = self.sessions.get(name)
        if old is not None:
            old.down.extend([Refused.of(ConfigError("replaced")), End()])
        wire.number, self.sessions[name] = number, wire
        wire.down.append(welcome)

    def close(self, wire: Wire) -> None:
        wire.is_closed = True
        wire.down.append(End())
        if wire in self.wires:
            self.wires.remove(wire)
        if self.sessions.get(wire.peer.name) is wire:
            del self.sessions[wire.peer.name]
            if self.service is not None:
                self.service.closed(wire.peer.name, wire.number, self.world.now_s)

    def upload(self, wire: Wire) -> None:
        """A payload arrives; the others are asked to fetch it."""
        digest, payload = wire.uploads.popleft()
        if self.service is None:
            return
        if digest not in self.blobs:
            self.blobs.put(digest, payload)
        self.spark()
        self.holding.announce(digest)
        self.service.blob_arrived(wire.peer.name, digest, self.world.now_s)
        for seat in self.ledger.committee.seats:
            if seat != self.name:
                self._send_word(seat, Keep(digest=digest, n_bytes=len(payload)))

    def pump(self, wire: Wire) -> None:
        """Commits leave while there is room on the way."""
        if self.service is not None and wire.follows is not None:
            for commit in self.service.commits(wire.follows, max(0, IN_FLIGHT - len(wire.down))):
                wire.down.append(commit)
                wire.follows += 1
