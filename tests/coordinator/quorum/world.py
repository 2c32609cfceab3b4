"""Seats of a committee under generated schedules: messages lost, late, doubled, out of order, one-way cuts,
crashes at any moment, stops, committees that change, disks that forget.

The oracle: of every round one record, on every disk; what nobody did is no evidence; and once all is well,
rounds go on. `BUGS` are planted on purpose: a simulation that does not find them proves nothing.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Final

import msgpack

from thinwire.coordinator.protocol.messages import BadMessage, digest_of, encode_message
from thinwire.coordinator.protocol.trust.seals import Committee, Sealed
from thinwire.coordinator.quorum.acceptor import Acceptor
from thinwire.coordinator.quorum.disk import VoteState
from thinwire.coordinator.quorum.events import Evidence, Leads, NewRecord, Role, Timing
from thinwire.coordinator.quorum.seat import Seat
from thinwire.coordinator.quorum.words import Accepted, Word, decode_word

RUN = b"r" * 32
BUGS: Final = ("forgets_promise", "ignores_promise", "forgets_accept", "no_recovery", "old_copy")
MILD, HOSTILE = Timing(0.1, 0.5, 0.2), Timing(0.05, 0.1, 0.1)


class Fault(AssertionError):
    """What the oracle has found."""


@dataclass(frozen=True)
class Body:
    """A record of these schedules."""

    round: int
    parent: bytes
    number: int
    seats: tuple[str, ...] = ()
    """The committee from the next round on; (): as before."""
    reseated: tuple[str, bytes] | None = None
    """A seat that need not rest any more, and its nonce."""

    def packed(self) -> bytes:
        plain = (self.round, self.parent, self.number, self.seats, self.reseated)
        packed: bytes = msgpack.packb(plain)
        return packed

    @classmethod
    def of(cls, record: bytes) -> Body:
        return cls(*msgpack.unpackb(record, use_list=False))


class Records:
    """Every record may be voted for: what a coordinator would check is not the matter here."""

    def place(self, record: bytes) -> tuple[int, bytes]:
        try:
            body = Body.of(record)
        except (ValueError, TypeError, msgpack.UnpackException) as e:
            raise BadMessage("no record") from e
        return body.round, body.parent

    def may_vote(self, record: bytes) -> bool:
        return True


@dataclass
class Key:
    """A quick stand-in for a signature: whoever knows a seat's name could forge it, and nobody does."""

    seat: str

    def sign(self, data: bytes) -> bytes:
        return blake2b(data, key=self.seat.encode(), digest_size=64).digest()

    def check(self, seat: str, signature: bytes, data: bytes) -> bool:
        return signature == Key(seat).sign(data)


@dataclass
class Disk:
    """Outlives its seat's process."""

    committee: Committee
    records: list[Sealed] = field(default_factory=list)
    head_digest: bytes = RUN
    vote: VoteState = field(default_factory=VoteState)
    rests: bytes | None = None
    me: str = ""

    @property
    def head(self) -> int:
        return len(self.records)

    def save_vote(self, vote: VoteState) -> None:
        self.vote = vote

    def append(self, sealed: Sealed) -> None:
        body = Body.of(sealed.record)
        if (body.round, body.parent) != (self.head + 1, self.head_digest):
            raise Fault(f"{self.me} appends a record that does not follow")
        self.records.append(sealed)
        self.head_digest = digest_of(sealed.record)
        if body.seats:
            self.committee = Committee.majority(body.round, body.seats)
        if body.reseated == (self.me, self.rests):
            self.rests = None

    def after(self, round_: int, limit: int) -> list[Sealed]:
        return self.records[round_ : round_ + limit]

    def copy(self) -> Disk:
        return replace(self, records=list(self.records))


@dataclass(frozen=True)
class Schedule:
    """What a world may do to its seats."""

    n_seats: int = 3
    n_spare: int = 2
    is_hostile: bool = False
    """Reboots in an instant and short patience: what a slow world hides."""
    changes: bool = True
    """Committees change."""
    restores: bool = False
    """Disks come back from an older copy, without votes: their seats rest, as they must."""
    bug: str | None = None


class World:
    def __init__(self, seed: int, schedule: Schedule) -> None:
        self.rng, self.schedule = random.Random(seed), schedule
        self.now_s = 100.0
        self.names = [f"seat-{i}" for i in range(schedule.n_seats + schedule.n_spare)]
        committee = Committee.majority(0, tuple(self.names[: schedule.n_seats]))
        self.disks = {name: Disk(committee, me=name) for name in self.names}
        self.copies: dict[str, Disk] = {}
        self.seats: dict[str, Seat] = {}
        self.stopped: set[str] = set()
        self.cut: set[tuple[str, str]] = set()
        self.loss = 0.05
        self.timing = HOSTILE if schedule.is_hostile else MILD
        self.sealed: dict[int, bytes] = {}
        self.happened: Counter[str] = Counter()
        self._n_records = 0
        self._network: list[tuple[float, float, str, str, bytes]] = []
        for name in self.names:
            self.boot(name)

    # ------------------------------------------------------------------------------------------- seats

    def boot(self, name: str) -> None:
        """The seat's process starts on what its disk has."""
        schedule = self.schedule
        if schedule.restores or schedule.bug == "old_copy":
            self._maybe_restored(name)
        disk = self.disks[name]
        if schedule.bug == "forgets_accept":
            disk.vote = VoteState(disk.vote.epoch, disk.vote.promised, None)
        if schedule.bug == "forgets_promise":
            disk.vote = VoteState(disk.vote.epoch, 0, disk.vote.accepted)
        kind = {"ignores_promise": _IgnoresPromise, "no_recovery": _NoRecovery}.get(schedule.bug or "", Seat)

        def send(to: str, word: Word) -> None:
            self._post(name, to, word)

        self.seats[name] = kind(
            RUN,
            Key(name),
            disk,
            Records(),
            send,
            self.now_s,
            rng=random.Random(self.rng.random()),
            timing=self.timing,
        )

    def _maybe_restored(self, name: str) -> None:
        others_rest = any(disk.rests for other, disk in self.disks.items() if other != name)
        is_planted = self.schedule.bug == "old_copy"
        if name in self.copies and self.rng.random() < 0.3 and (is_planted or not others_rest):
            self.happened["restored"] += 1
            disk = self.disks[name] = self.copies[name].copy()
            if not is_planted:
                disk.vote, disk.rests = VoteState(), self.rng.randbytes(16)
        self.copies[name] = self.disks[name].copy()

    def _post(self, sender: str, to: str, word: Word) -> None:
        draw = self.rng.random()
        if (sender, to) in self.cut or to not in self.seats or draw < self.loss:
            return
        delay_s = self.rng.uniform(0.001, 0.05) if draw < 0.9 else self.rng.uniform(0.05, 1.5)
        data = encode_message(word)
        heapq.heappush(self._network, (self.now_s + delay_s, self.rng.random(), sender, to, data))
        if self.rng.random() < 0.03:
            late_s = self.now_s + self.rng.uniform(0, 2)
            heapq.heappush(self._network, (late_s, self.rng.random(), sender, to, data))

    # -------------------------------------------------------------------------------------------- time

    def run_for(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while True:
            arrives_s = self._network[0][0] if self._network else end_s
            awake = {name: seat for name, seat in self.seats.items() if name not in self.stopped}
            wakes_s = min((seat.wake_s for seat in awake.values()), default=end_s)
            self.now_s = max(self.now_s, min(arrives_s, wakes_s, end_s))
            if self.now_s >= end_s:
                return
            if arrives_s <= wakes_s:
                self._deliver()
                continue
            for name, seat in awake.items():
                if seat.wake_s <= self.now_s:
                    seat.tick(self.now_s)
                    if seat.wake_s <= self.now_s:
                        raise Fault(f"{name} does not sleep")
                    self._look(name)

    def _deliver(self) -> None:
        _, draw, sender, to, data = heapq.heappop(self._network)
        if to not in self.seats or (sender, to) in self.cut:
            return
        if to in self.stopped:
            heapq.heappush(self._network, (self.now_s + 0.3, draw, sender, to, data))
            return
        self.seats[to].receive(sender, decode_word(data), self.now_s)
        self._look(to)

    def _look(self, name: str) -> None:
        """What a coordinator would do with what its seat says; and the oracle."""
        seat, disk = self.seats[name], self.disks[name]
        while seat.events:
            match seat.events.pop(0):
                case NewRecord(round_):
                    self.happened["sealed"] += 1
                    self._compare(round_, digest_of(disk.records[round_ - 1].record))
                case Leads():
                    self.happened["elections"] += 1
                case Evidence(accused, what):
                    raise Fault(f"{what} by {accused}, and nobody lies")
        if seat.role is Role.LEADING and seat.proposal is None and self.rng.random() < 0.5:
            seat.propose(self._record(seat, disk).packed(), self.now_s)
            self._look(name)

    def _record(self, seat: Seat, disk: Disk) -> Body:
        self._n_records += 1
        seats: tuple[str, ...] = ()
        reseated = next(iter(sorted(seat.resting.items())), None)
        if reseated is not None:
            self.happened["reseated"] += 1
            seats = disk.committee.seats
        elif self.schedule.changes and self.rng.random() < 0.03:
            self.happened["changes"] += 1
            # A committee of one whose seat has lost its votes rests for ever.
            n = min(len(self.names), self.rng.choice([3 if self.schedule.restores else 1, 3, 3, 5]))
            seats = tuple(sorted(self.rng.sample(self.names, n)))
        return Body(disk.head + 1, disk.head_digest, self._n_records, seats, reseated)

    def _compare(self, round_: int, digest: bytes) -> None:
        if self.sealed.setdefault(round_, digest) != digest:
            raise Fault(f"two records of round {round_} were sealed")

    # ------------------------------------------------------------------------------------- misfortunes

    def misfortune(self) -> None:
        draw, name = self.rng.random(), self.rng.choice(self.names)
        if self.schedule.is_hostile and draw < 0.5:
            self.boot(name)  # what it has sent is still on its way
            self.stopped.discard(name)
            self.happened["crashes"] += 1
            return
        if draw < 0.25 and name in self.seats:
            del self.seats[name]
            self.stopped.discard(name)
            self.happened["crashes"] += 1
        elif draw < 0.5 and name not in self.seats:
            self.boot(name)
        elif draw < 0.6 and name in self.seats:
            self.stopped.add(name)
        elif draw < 0.7:
            self.stopped.discard(name)
        elif draw < 0.85:
            share = self.rng.choice([0.2, 0.6])
            pairs = [(a, b) for a in self.names for b in self.names if a != b]
            self.cut = {pair for pair in pairs if self.rng.random() < share}
        else:
            self.cut = set()
        self.loss = self.rng.choice([0.0, 0.05, 0.3])

    def go(self) -> Counter[str]:
        """Misfortunes, then peace. Raises Fault. Returns how often what happened."""
        is_hostile = self.schedule.is_hostile
        for _ in range(self.rng.randint(60, 200) if is_hostile else self.rng.randint(5, 25)):
            self.run_for(self.rng.uniform(0.005, 0.12) if is_hostile else self.rng.uniform(0.05, 2.0))
            self.misfortune()
        self._peace()
        return self.happened

    def _peace(self) -> None:
        self.cut, self.loss, self.stopped, self.timing = set(), 0.0, set(), MILD
        self.schedule = Schedule(changes=False, bug=self.schedule.bug)
        for name in self.names:
            if name not in self.seats:
                self.boot(name)
        before = max(disk.head for disk in self.disks.values())
        self.run_for(15.0)
        for disk in self.disks.values():
            for i, sealed in enumerate(disk.records):
                self._compare(i + 1, digest_of(sealed.record))
        if max(disk.head for disk in self.disks.values()) <= before + 3:
            raise Fault("no progress although all is well")
        seated = self.disks[max(self.disks, key=lambda name: self.disks[name].head)].committee.seats
        if any(self.disks[name].rests for name in seated):
            raise Fault("a seat still rests although all is well")


class _NoPromise(Acceptor):
    @property
    def promised(self) -> int:
        return 0


class _IgnoresPromise(Seat):
    acceptor = _NoPromise


class _NoRecovery(Seat):
    def _count_promises(self, now_s: float) -> None:
        self._promises = dict[str, Accepted | None].fromkeys(self._promises)
        super()._count_promises(now_s)


def schedule_of(seed: int, *, is_hostile: bool, bug: str | None = None) -> Schedule:
    """Which kind of world a seed stands for."""
    rng = random.Random(seed)
    if bug == "old_copy" or (is_hostile and rng.random() < 0.5):
        return Schedule(n_spare=0, is_hostile=is_hostile, changes=False, bug=bug)
    n_seats = 3 if is_hostile else rng.choice([1, 3, 3, 5])
    restores = n_seats > 1 and rng.random() < 0.2
    return Schedule(n_seats, 2, is_hostile, changes=True, restores=restores, bug=bug)


def first_fault(seeds: range, *, is_hostile: bool, bug: str | None = None) -> tuple[int, Fault] | None:
    """The first of the seeds whose world has one."""
    for seed in seeds:
        try:
            World(seed, schedule_of(seed, is_hostile=is_hostile, bug=bug)).go()
        except Fault as fault:
            return seed, fault
    return None


def main(tell: Callable[[str], None] = print) -> int:
    """Many schedules, mild and hostile; 1 if one has a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="schedules, half of them hostile")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--bug", choices=BUGS, help="planted, to see that it is found")
    options = parser.parse_args()
    happened: Counter[str] = Counter()
    faults = 0
    for seed in range(options.first, options.first + options.n):
        try:
            happened += World(seed, schedule_of(seed, is_hostile=bool(seed % 2), bug=options.bug)).go()
        except Fault as fault:
            faults += 1
            tell(f"seed {seed}: {fault}")
    tell(f"{options.n} schedules, {faults} with a fault; {dict(happened)}")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
