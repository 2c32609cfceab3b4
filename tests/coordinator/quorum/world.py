"""Seats of a committee in a world that is all ours: `misfortunes` befall them by the clock, an `adversary`
needs none."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tests.coordinator.quorum.oracle import Fault, Oracle
from tests.coordinator.quorum.stand_ins import RUN, Body, Disk, Key, PowerCut, Records
from thinwire.coordinator.protocol.messages import encode_message
from thinwire.coordinator.protocol.trust.seals import Committee
from thinwire.coordinator.quorum.disk import VoteState
from thinwire.coordinator.quorum.events import DiskFailed, Evidence, Leads, NewRecord, Role, Timing
from thinwire.coordinator.quorum.seat import Seat
from thinwire.coordinator.quorum.words import Word, decode_word

MILD, HOSTILE = Timing(0.1, 0.5, 0.2), Timing(0.05, 0.1, 0.1)


@dataclass(frozen=True)
class Schedule:
    """What a world may do to its seats."""

    n_seats: int = 3
    n_spare: int = 2
    is_hostile: bool = False
    """Reboots in an instant and short patience: what a slow world hides."""
    is_aimed: bool = False
    """No clock orders what happens: words and seats are as late as serves to do harm."""
    changes: bool = True
    """Committees change."""
    restores: bool = False
    """Disks come back from an older copy, without votes: their seats rest, as they must."""
    bug: str | None = None


@dataclass(frozen=True)
class Bug:
    """A seat that is none of ours, and what its disk has forgotten when it starts again."""

    seat: type[Seat] = Seat
    forget: Callable[[Disk], None] = lambda _disk: None


class Flying(NamedTuple):
    """A word on its way."""

    arrives_s: float
    draw: float
    sender: str
    to: str
    word: Word


class World:
    """Seats by their names; `post` is what they send with."""

    def __init__(self, seed: int, schedule: Schedule, bug: Bug) -> None:
        self.rng, self.schedule = random.Random(seed), schedule
        self._bug = bug
        self.now_s = 100.0
        self.clocks: dict[str, float] = {}
        """Of seats that are ahead of the others."""
        self.names = [f"seat-{i}" for i in range(schedule.n_seats + schedule.n_spare)]
        committee = Committee.majority(0, tuple(self.names[: schedule.n_seats]))
        self.oracle = Oracle(committee)
        self.disks = {name: self._disk(Disk(committee, me=name)) for name in self.names}
        self.copies: dict[str, Disk] = {}
        self.seats: dict[str, Seat] = {}
        self.timing = HOSTILE if schedule.is_hostile else MILD
        self.disk_faults = 0.0
        """Of a thousand writes."""
        self.late_payloads = 0.0
        self.post: Callable[[str, str, Word], None] = lambda _sender, _to, _word: None
        self.happened: Counter[str] = Counter()
        self._n_records = 0

    # ------------------------------------------------------------------------------------------- seats

    def boot(self, name: str) -> None:
        """The seat's process starts on what its disk has."""
        if self.schedule.restores or self.schedule.bug == "old_copy":
            self._maybe_restored(name)
        disk = self.disks[name]
        self._bug.forget(disk)

        def send(to: str, word: Word) -> None:
            self.post(name, to, word)

        self.seats[name] = self._bug.seat(
            RUN,
            Key(name, self.oracle.signed),
            disk,
            Records(lambda: self.rng.random() >= self.late_payloads),
            send,
            self.clock(name),
            rng=random.Random(self.rng.random()),
            timing=self.timing,
        )

    def crash(self, name: str) -> None:
        """What it has sent is still on its way."""
        self.happened["crashes"] += 1
        self.seats.pop(name, None)

    def clock(self, name: str) -> float:
        return max(self.now_s, self.clocks.get(name, 0.0))

    def tick(self, name: str) -> None:
        seat = self.seats[name]
        self._call(name, seat.tick)
        if self.seats.get(name) is seat and seat.wake_s <= self.clock(name):
            raise Fault(f"{name} does not sleep")

    def deliver(self, flying: Flying) -> None:
        """Now and then as bytes: that costs more than all the rest."""
        word = flying.word
        if flying.draw < 0.05:
            word = decode_word(encode_message(word))
            if word != flying.word:
                raise Fault("a word is not what was sent")
        seat = self.seats[flying.to]
        self._call(flying.to, lambda now_s: seat.receive(flying.sender, word, now_s))
        if self.seats.get(flying.to) is seat and seat.unvoted is not None and self.rng.random() < 0.3:
            self._call(flying.to, seat.vote_again)

    def propose(self, name: str) -> None:
        """What the coordinator of a leader does."""
        seat = self.seats.get(name)
        if seat is not None and seat.role is Role.LEADING and seat.proposal is None:
            record = self._record(seat, self.disks[name]).packed()
            self._call(name, lambda now_s: seat.propose(record, now_s))

    def _call(self, name: str, what: Callable[[float], None]) -> None:
        try:
            what(self.clock(name))
        except PowerCut:
            self.crash(name)
            if self.rng.random() < 0.8:
                self.boot(name)
            return
        seat = self.seats[name]
        for event in seat.events:
            match event:
                case NewRecord():
                    self.happened["sealed"] += 1
                case Leads():
                    self.happened["elections"] += 1
                case DiskFailed():
                    self.happened["disks failed"] += 1
                case Evidence(accused, what_):
                    raise Fault(f"{what_} by {accused}, and nobody lies")
        seat.events.clear()

    def _record(self, seat: Seat, disk: Disk) -> Body:
        self._n_records += 1
        seats: tuple[str, ...] = ()
        reseated = next(iter(sorted(seat.resting.items())), None)
        if reseated is not None:
            self.happened["reseated"] += 1
            seats = disk.committee.seats
        elif self.schedule.changes and self.rng.random() < (0.2 if self.schedule.is_aimed else 0.05):
            self.happened["changes"] += 1
            # A committee of one whose seat has lost its votes rests for ever.
            n = min(len(self.names), self.rng.choice([3 if self.schedule.restores else 1, 3, 3, 5]))
            seats = tuple(sorted(self.rng.sample(self.names, n)))
        return Body(disk.head + 1, disk.head_digest, self._n_records, seats, reseated)

    # ------------------------------------------------------------------------------------------- disks

    def _disk(self, disk: Disk) -> Disk:
        disk.fate, disk.appended = self._fate, self.oracle.appended
        return disk

    def _fate(self, when: str) -> Exception | None:
        draw = self.rng.random() * 1000
        if draw >= self.disk_faults:
            return None
        return PowerCut(when) if draw < 0.8 * self.disk_faults else OSError("no space left on device")

    def _maybe_restored(self, name: str) -> None:
        others_rest = any(disk.rests for other, disk in self.disks.items() if other != name)
        is_planted = self.schedule.bug == "old_copy"
        if name in self.copies and self.rng.random() < 0.3 and (is_planted or not others_rest):
            self.happened["restored"] += 1
            disk = self.disks[name] = self.copies[name].copy()
            if not is_planted:
                disk.vote, disk.rests = VoteState(), self.rng.randbytes(16)
        self.copies[name] = self.disks[name].copy()

    def be_kind(self) -> None:
        """No more misfortunes but those that are under way."""
        self.disk_faults = self.late_payloads = 0.0
        self.schedule = Schedule(changes=False, bug=self.schedule.bug)
        self.timing = MILD

    def state(self) -> str:
        """For people."""
        seats = [(name, self.disks[name].head, seat.role.name) for name, seat in self.seats.items()]
        return f"{seats}, resting {[name for name, disk in self.disks.items() if disk.rests]}"
