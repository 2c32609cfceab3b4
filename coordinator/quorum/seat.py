"""One seat of a committee that agrees on the ledger's next record: a pure state machine, time is an argument.

One-slot Multi-Paxos (Lamport, "Paxos Made Simple", 2001): the record of round r + 1 is proposed only after
that of round r is sealed. So a seat remembers one promise and one vote, and there is no log to match: the
ledger is the log. A vote is a signature, and a majority of them is the seal (`protocol.trust.seals`).

It agrees while seats crash, and messages are lost, late, doubled or out of order; a seat that lies is found,
not outvoted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar, Final, Literal

from ..protocol.messages import digest_of
from ..protocol.trust.seals import Committee, Sealed
from .acceptor import Acceptor
from .catching_up import CatchingUp
from .disk import Records, SeatDisk, Signer
from .words import (
    Accepted,
    Aye,
    Batch,
    Canvass,
    Follow,
    Nack,
    Ping,
    Pong,
    Prepare,
    Promise,
    Propose,
    Voted,
    Word,
)


@dataclass(frozen=True, slots=True)
class Timing:
    """In seconds. `beat_s`: between two pings of a leader; `patience_s`: without a word, until another may
    lead; `retry_s`: until something is said again."""

    beat_s: float = 0.5
    patience_s: float = 3.0
    retry_s: float = 1.0


class Role(Enum):
    FOLLOWING = auto()
    CANVASSING = auto()
    """Asks whether anybody would follow: nothing is promised yet."""
    PREPARING = auto()
    """Collects promises."""
    RECOVERING = auto()
    """Leads, and first proposes again what may have been sealed before."""
    LEADING = auto()


LEADS: Final = (Role.RECOVERING, Role.LEADING)


@dataclass(frozen=True, slots=True)
class Leads:
    """This seat may propose the record after its head."""


@dataclass(frozen=True, slots=True)
class StepsDown:
    """It may not any more; what became of an open proposal is not known."""

    why: Literal["another leads", "behind", "no majority", "outbid", "the committee has changed"]


@dataclass(frozen=True, slots=True)
class NewRecord:
    """The record of this round is sealed, and on the disk."""

    round: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """A seat did what no seat of ours does: two records for one ballot, or a seal that is none."""

    seat: str
    what: Literal["two records", "bad seal"]


SeatEvent = Leads | StepsDown | NewRecord | Evidence


class Seat:
    """`send(seat, word)` queues, and may lose, delay or double. `events` are taken by the caller after each
    call; `tick` is called by `wake_s` at the latest."""

    acceptor: ClassVar[type[Acceptor]] = Acceptor

    def __init__(
        self,
        run_id: bytes,
        signer: Signer,
        disk: SeatDisk,
        records: Records,
        send: Callable[[str, Word], None],
        now_s: float,
        *,
        rng: random.Random,
        timing: Timing = Timing(),
    ) -> None:
        self._run_id, self._signer, self._disk, self._records = run_id, signer, disk, records
        self._acceptor = self.acceptor(run_id, signer, disk, records)
        self._send, self._rng, self._timing = send, rng, timing
        self.me = signer.seat
        self.role = Role.FOLLOWING
        self.leader: str | None = None
        """The seat that leads, as far as is known here."""
        self.resting: dict[str, bytes] = {}
        """Of a leader: seats that are up to date and rest, and the nonce that a record would have to name."""
        self.events: list[SeatEvent] = []
        self.proposal: bytes | None = None
        """Of a leader: the record that waits for its seal."""
        self._work = b""
        self._heard_s = now_s
        self._ballot = 0
        self._highest = disk.vote.promised
        self._ayes: set[str] = set()
        self._promises: dict[str, Accepted | None] = {}
        self._votes: dict[str, bytes] = {}
        self._pongs_s: dict[str, float] = {}
        self._led_s = self._proposed_s = now_s
        self._catching_up = CatchingUp(send, disk, timing.retry_s)
        self.wake_s = 0.0
        self._be_patient(now_s)

    # --------------------------------------------------------------------------------------- the leader

    def propose(self, record: bytes, now_s: float, work: bytes = b"") -> None:
        """The record of the open round, and the blob that it names. Raises RuntimeError unless this seat
        leads and nothing is proposed: a ballot has one record, ever."""
        if self.role is not Role.LEADING or self.proposal is not None:
            raise RuntimeError("only a leader proposes, one record at a time")
        self._propose(record, work, now_s)

    def _propose(self, record: bytes, work: bytes, now_s: float) -> None:
        self.proposal, self._work, self._votes, self._proposed_s = record, work, {}, now_s
        proposed = Propose(ballot=self._ballot, round=self._disk.head + 1, record=record, work=work)
        self._cast(proposed)  # the others' disks write while this one does
        voted = self._acceptor.accept(proposed)
        if isinstance(voted, Voted):
            self._count_vote(self.me, voted, now_s)
        else:
            self._step_down(now_s, "outbid")

    # ---------------------------------------------------------------------------------------------- time

    def tick(self, now_s: float) -> None:
        """Lets time pass."""
        if now_s < self.wake_s:
            return
        if not self._acceptor.may_vote:
            self._be_patient(now_s)
            self._cast(self._canvass)  # how an onlooker learns what is new
        elif self.role in LEADS:
            self._beat(now_s)
        else:
            self.role, self.leader, self._ayes = Role.CANVASSING, None, {self.me}
            self._be_patient(now_s)
            self._cast(self._canvass)
            self._count_ayes(now_s)

    def _beat(self, now_s: float) -> None:
        patience_s = self._timing.patience_s
        n_alive = 1 + sum(now_s - heard_s <= patience_s for heard_s in self._pongs_s.values())
        if n_alive < self._committee.need and now_s - self._led_s > patience_s:
            self._step_down(now_s, "no majority")
            return
        self.wake_s = now_s + self._timing.beat_s
        self._cast(Ping(ballot=self._ballot, head=self._disk.head))
        if self.proposal is not None and now_s - self._proposed_s > self._timing.retry_s:
            self._proposed_s = now_s
            round_, record = self._disk.head + 1, self.proposal
            again = Propose(ballot=self._ballot, round=round_, record=record, work=self._work)
            for seat in self._others:
                if seat not in self._votes:
                    self._send(seat, again)

    @property
    def _canvass(self) -> Canvass:
        return Canvass(highest=self._highest, head=self._disk.head)

    # ----------------------------------------------------------------------------------------- elections

    def _count_ayes(self, now_s: float) -> None:
        if self.role is not Role.CANVASSING or len(self._ayes) < self._committee.need:
            return
        self._ballot = self._highest = self._committee.ballot_above(self._highest, self.me)
        self._acceptor.promise(self._ballot)
        self.role, self._promises = Role.PREPARING, {self.me: self._acceptor.accepted}
        self._be_patient(now_s)
        self._cast(Prepare(ballot=self._ballot, head=self._disk.head))
        self._count_promises(now_s)

    def _count_promises(self, now_s: float) -> None:
        if self.role is not Role.PREPARING or len(self._promises) < self._committee.need:
            return
        self.leader, self._led_s, self.wake_s = self.me, now_s, now_s
        self._pongs_s = {seat: now_s for seat in self._promises if seat != self.me}
        found = [accepted for accepted in self._promises.values() if accepted is not None]
        if found:
            # It may have been sealed: it goes first, as it is.
            self.role = Role.RECOVERING
            newest = max(found, key=lambda accepted: accepted.ballot)
            self._propose(newest.record, newest.work, now_s)
        else:
            self.role = Role.LEADING
            self.events.append(Leads())
        self.tick(now_s)

    def _count_vote(self, seat: str, voted: Voted, now_s: float) -> None:
        record, round_ = self.proposal, self._disk.head + 1
        if record is None or (voted.ballot, voted.round) != (self._ballot, round_):
            return
        if seat in self._votes or seat not in self._committee.seats or voted.digest != digest_of(record):
            return
        data = self._committee.signed(self._run_id, voted.ballot, round_, record)
        if seat != self.me and not self._signer.check(seat, voted.signature, data):
            return
        self._votes[seat] = voted.signature
        if len(self._votes) < self._committee.need:
            return
        seal = self._committee.seal(self._ballot, self._votes)
        sealed = Sealed(record=record, seal=seal, work=self._work)
        epoch, seats = self._committee.epoch, self._others
        self.proposal, self._votes = None, {}
        self._append(sealed)
        for other in seats:
            self._send(other, Batch(sealed=(sealed,)))
        if self._committee.epoch != epoch:
            self._step_down(now_s, "the committee has changed")
        elif self.role is Role.RECOVERING:
            self.role = Role.LEADING
            self.events.append(Leads())

    # ------------------------------------------------------------------------------------------ messages

    def receive(self, seat: str, word: Word, now_s: float) -> None:
        """From a seat or an onlooker, as the transport has proved it."""
        match word:
            case Ping():
                self._pinged(seat, word, now_s)
            case Propose():
                self._proposed_to(seat, word, now_s)
            case Voted():
                self._count_vote(seat, word, now_s)
            case Pong():
                self._ponged(seat, word, now_s)
            case Batch():
                self._take(seat, word, now_s)
            case Follow(after=after):
                self._catching_up.give(seat, after)
            case _:
                self._elect(seat, word, now_s)

    def _elect(self, seat: str, word: Word, now_s: float) -> None:
        is_seat = seat in self._committee.seats
        match word:
            case Canvass():
                self._canvassed(seat, word, now_s)
            case Prepare():
                self._asked_to_promise(seat, word, now_s)
            case Aye(highest=highest):
                self._highest = max(self._highest, highest)
                if self.role is Role.CANVASSING and is_seat:
                    self._ayes.add(seat)
                    self._count_ayes(now_s)
            case Promise(ballot=ballot, head=head):
                is_current = (ballot, head) == (self._ballot, self._disk.head)
                if self.role is Role.PREPARING and is_current and is_seat:
                    self._promises[seat] = word.accepted
                    self._count_promises(now_s)
            case Nack():
                self._highest = max(self._highest, word.promised)
                if word.promised > self._ballot and self.role is not Role.FOLLOWING:
                    self._step_down(now_s, "outbid")
                self._catching_up.heard_of(seat, word.head, now_s)

    def _pinged(self, seat: str, ping: Ping, now_s: float) -> None:
        if self._committee.owner(ping.ballot) != seat or ping.ballot < self._acceptor.promised:
            self._send(seat, Nack(promised=self._acceptor.promised, head=self._disk.head))
        else:
            self._led_by(seat, ping.ballot, now_s)
            self._send(seat, Pong(ballot=ping.ballot, head=self._disk.head, nonce=self._disk.rests))
        self._catching_up.heard_of(seat, ping.head, now_s)

    def _ponged(self, seat: str, pong: Pong, now_s: float) -> None:
        if self.role not in LEADS or pong.ballot != self._ballot or seat not in self._committee.seats:
            return
        self._pongs_s[seat] = now_s
        if pong.nonce is None:
            self.resting.pop(seat, None)
        elif pong.head == self._disk.head:
            self.resting[seat] = pong.nonce
        if pong.head < self._disk.head:
            self._catching_up.give(seat, pong.head)
        self._catching_up.heard_of(seat, pong.head, now_s)

    def _canvassed(self, seat: str, canvass: Canvass, now_s: float) -> None:
        if seat not in self._committee.seats or canvass.head < self._disk.head:
            self._catching_up.give(seat, canvass.head)  # also how one that was dropped learns of it
            return
        is_led = self.leader is not None and now_s - self._heard_s <= self._timing.patience_s
        if self._acceptor.may_vote and self.role not in LEADS and not is_led:
            self._send(seat, Aye(highest=self._highest))

    def _asked_to_promise(self, seat: str, prepare: Prepare, now_s: float) -> None:
        head = self._disk.head
        if prepare.head != head:
            self._catching_up.give(seat, prepare.head)
            self._catching_up.heard_of(seat, prepare.head, now_s)
        elif not self._acceptor.may_vote:
            return
        elif self._committee.owner(prepare.ballot) != seat or prepare.ballot <= self._acceptor.promised:
            self._send(seat, Nack(promised=self._acceptor.promised, head=head))
        else:
            self._acceptor.promise(prepare.ballot)
            self._highest = max(self._highest, prepare.ballot)
            self._step_down(now_s, "outbid")
            self._send(seat, Promise(ballot=prepare.ballot, head=head, accepted=self._acceptor.accepted))

    def _proposed_to(self, seat: str, proposed: Propose, now_s: float) -> None:
        head = self._disk.head
        if proposed.round != head + 1:
            self._catching_up.give(seat, proposed.round - 1)
            self._catching_up.heard_of(seat, proposed.round - 1, now_s)
        elif self._committee.owner(proposed.ballot) != seat or proposed.ballot < self._acceptor.promised:
            self._send(seat, Nack(promised=self._acceptor.promised, head=head))
        else:
            self._led_by(seat, proposed.ballot, now_s)
            voted = self._acceptor.accept(proposed)
            if isinstance(voted, Voted):
                self._send(seat, voted)
            elif voted == "two records":
                self.events.append(Evidence(seat, voted))

    def _take(self, seat: str, batch: Batch, now_s: float) -> None:
        """Seals speak for themselves: whoever brings them."""
        for sealed in batch.sealed:
            head, committee = self._disk.head, self._committee
            place = self._acceptor.place(sealed.record)
            if place is not None and place[0] <= head:
                continue
            if place is not None and place[0] > head + 1:
                self._catching_up.heard_of(seat, place[0], now_s)
                return
            is_next = place == (head + 1, self._disk.head_digest)
            is_sealed = committee.has_sealed(
                self._run_id, head + 1, sealed.record, sealed.seal, self._signer.check
            )
            if not is_next or not is_sealed:
                self.events.append(Evidence(seat, "bad seal"))
                return
            self._append(sealed)
            self._step_down(now_s, "behind")
        self._catching_up.took(seat, len(batch.sealed), now_s)

    # -------------------------------------------------------------------------------------- small things

    @property
    def _committee(self) -> Committee:
        return self._acceptor.committee

    @property
    def _others(self) -> list[str]:
        return [seat for seat in self._committee.seats if seat != self.me]

    def _append(self, sealed: Sealed) -> None:
        self._disk.append(sealed)
        self.resting = {}
        self.events.append(NewRecord(self._disk.head))

    def _cast(self, word: Word) -> None:
        for seat in self._others:
            self._send(seat, word)

    def _be_patient(self, now_s: float) -> None:
        self.wake_s = now_s + self._timing.patience_s * self._rng.uniform(1, 2)

    def _led_by(self, seat: str, ballot: int, now_s: float) -> None:
        self._highest = max(self._highest, ballot)
        if seat != self.me:
            self._step_down(now_s, "another leads")
        self.leader, self._heard_s = seat, now_s

    def _step_down(self, now_s: float, why: str) -> None:
        """Follows; nobody in particular, until a leader is heard."""
        if self.role is not Role.FOLLOWING:
            if self.role in LEADS:
                self.events.append(StepsDown(why))  # type: ignore[arg-type]
            self.role, self.leader = Role.FOLLOWING, None
            self.proposal, self._votes, self._ayes, self._promises = None, {}, set(), {}
        self._be_patient(now_s)
