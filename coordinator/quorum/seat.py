"""One seat of a committee that agrees on the ledger's next record: a pure state machine, time is an argument.

One-slot Multi-Paxos (Lamport, "Paxos Made Simple", 2001): the record of round r + 1 is proposed only after
that of round r is sealed. So a seat remembers one promise and one vote, and there is no log to match: the
ledger is the log. A vote is a signature, and a majority of them is the seal (`protocol.trust.seals`).

It agrees while seats crash, and messages are lost, late, doubled or out of order; a seat that lies is found,
not outvoted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final

from ..protocol.messages import digest_of
from ..protocol.trust.seals import Committee, Sealed
from .acceptor import Acceptor
from .catching_up import CatchingUp
from .clocks import Clocks
from .disk import Records, SeatDisk, Signer
from .events import (
    DEFAULT_TIMING,
    DiskFailed,
    Evidence,
    Leads,
    NewRecord,
    Role,
    SeatEvent,
    StepsDown,
    Timing,
    Why,
)
from .patience import Patience
from .proposal import Proposal
from .reign import Reign
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
    Sealing,
    Voted,
    Word,
)

_ELECTION: Final = 0.5
"""Of the patience: an election that nobody has won is tried again sooner than a silent leader is given up."""


class Seat:
    """`send(seat, word)` queues, and may lose, delay or double. `events` are taken by the caller after each
    call; `tick` is called by `wake_s` at the latest. `wall_ms`: this machine's clock, for other leaders; 0:
    they are not told."""

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
        timing: Timing = DEFAULT_TIMING,
        wall_ms: Callable[[], int] = lambda: 0,
    ) -> None:
        self._run_id, self._signer, self._disk = run_id, signer, disk
        self._acceptor = self.acceptor(run_id, signer, disk, records)
        self._send, self._rng, self._timing, self._clocks = send, rng, timing, Clocks(wall_ms)
        self._patience, self._answers = Patience(timing), Patience(timing)
        """With who leads; as a leader, with the answers of the others."""
        self._catching_up = CatchingUp(send, disk, timing.retry_s)
        self.me = signer.seat
        self.role = Role.FOLLOWING
        self.leader: str | None = None
        """The seat that leads, as far as is known here."""
        self._led_by = 0
        """Its ballot, where it is another one."""
        self.events: list[SeatEvent] = []
        self._reign: Reign | None = None
        self._open: Proposal | None = None
        self._ballot = 0
        """Of this seat: it asks for promises, or leads."""
        self._highest = 0
        """That was heard of."""
        self._ayes: set[str] = set()
        self._promises: dict[str, Accepted | None] = {}
        self._early: tuple[str, Propose] | None = None
        """What was proposed upon a record that is on its way: it need not be said again."""
        self._unvoted: tuple[str, Propose] | None = None
        """What was proposed in the open round, and has no vote of this seat's yet."""
        self._heard_s = self.wake_s = now_s
        if not self._committee.is_only(self.me):  # who is alone waits for nobody
            self._be_patient(now_s)

    @property
    def proposal(self) -> bytes | None:
        """Of a leader: the record that waits for its seal."""
        return None if self._open is None else self._open.record

    @property
    def resting(self) -> dict[str, bytes]:
        """Of a leader: seats that rest, and the nonce that a record would have to name."""
        return {} if self._reign is None else self._reign.resting

    def time_ms(self, now_s: float) -> int:
        """For the record that a leader proposes next; see `Clocks.time_ms`."""
        return self._clocks.time_ms(self._committee.seats, now_s)

    @property
    def unvoted(self) -> bytes | None:
        """The record of the open round, if this seat was asked for its vote and has not given it; see
        `vote_again`."""
        if self._open is not None:
            return None if self.me in self._open.votes else self._open.record
        unvoted = None if self._unvoted is None else self._unvoted[1]
        return unvoted.record if unvoted is not None and unvoted.round == self._disk.head + 1 else None

    # --------------------------------------------------------------------------------------- the leader

    def propose(self, record: bytes, now_s: float, work: bytes = b"") -> None:
        """The record of the open round, and the blob that it names. Raises RuntimeError unless this seat
        leads and nothing is proposed, for a ballot has one record, ever; ValueError for a record that does
        not follow the head."""
        if self.role is not Role.LEADING or self._open is not None:
            raise RuntimeError("only a leader proposes, one record at a time")
        if not self._acceptor.follows(record):
            raise ValueError("this record does not follow the head")
        with self._writing(now_s):
            self._propose(record, work, now_s)

    def _propose(self, record: bytes, work: bytes, now_s: float) -> None:
        word = Propose(ballot=self._ballot, round=self._disk.head + 1, record=record, work=work)
        self._open = Proposal(word, now_s, self._timing.retry_s)
        self._cast(word)  # the others' disks write while this one does
        self._vote_for(self._open, now_s)

    def _vote_for(self, proposal: Proposal, now_s: float) -> None:
        """The leader's own vote. One who recovers a record may lack what it names: others vote meanwhile."""
        voted = self._acceptor.accept(proposal.word)
        if isinstance(voted, Voted):
            self._count_vote(self.me, voted, now_s)
        elif voted != "no vote":
            self._step_down(now_s, "outbid")

    def _count_vote(self, seat: str, voted: Voted, now_s: float) -> None:
        if self._open is None:
            return
        check = None if seat == self.me else self._signer.check
        self._open.add(self._run_id, self._committee, seat, voted, check)
        sealed = self._open.sealed(self._committee)
        if sealed is None:
            return
        epoch, others = self._committee.epoch, self._others
        digest, self._open = self._open.digest, None
        self._append(sealed)
        for other in others:  # they have the record, or it is on the way to them
            self._send(other, Sealing(head=self._disk.head, digest=digest, seal=sealed.seal))
        for other in self._others:
            if other not in others:
                self._send(other, Batch(head=self._disk.head, sealed=(sealed,)))
        if self._committee.epoch != epoch:
            self._step_down(now_s, "the committee has changed")
            if self._acceptor.may_vote:
                # Nobody else need wait for silence: it tries to lead the new one, too.
                self.wake_s = now_s + self._timing.beat_s
        elif self.role is Role.RECOVERING:
            self.role = Role.LEADING
            self.events.append(Leads())

    # ---------------------------------------------------------------------------------------------- time

    def tick(self, now_s: float) -> None:
        """Lets time pass."""
        if now_s >= self.wake_s:
            with self._writing(now_s):
                self._wake(now_s)

    def _wake(self, now_s: float) -> None:
        if self._reign is None:
            self._canvass(now_s)
        elif now_s < self._carried_to_s(self._reign):
            self._beat(self._reign, now_s)
        else:
            self._step_down(now_s, "no majority")
            self._canvass(now_s)  # who follows hears by it that nobody leads, and need not wait for silence

    def _canvass(self, now_s: float) -> None:
        self._cast(Canvass(highest=self._highest, head=self._disk.head))
        may_vote = self._acceptor.may_vote  # else it only asks for what is new
        self._be_patient(now_s, _ELECTION if may_vote else 1)
        if may_vote:
            self.role, self.leader, self._ayes = Role.CANVASSING, None, {self.me}
            self._count_ayes(now_s)

    def _carried_to_s(self, reign: Reign) -> float:
        return reign.carried_to_s(self._committee.need, self._answers.s)

    def _beat(self, reign: Reign, now_s: float) -> None:
        self.wake_s = min(now_s + self._timing.beat_s, self._carried_to_s(reign))
        self._cast(Ping(ballot=self._ballot, head=self._disk.head))
        proposal = self._open
        if proposal is not None and proposal.is_due(now_s):
            for seat in self._others:
                if seat not in proposal.votes:
                    self._send(seat, proposal.word)
            if self.me not in proposal.votes:
                self._vote_for(proposal, now_s)

    # ----------------------------------------------------------------------------------------- elections

    def _count_ayes(self, now_s: float) -> None:
        if self.role is not Role.CANVASSING or len(self._ayes) < self._committee.need:
            return
        try:
            ballot = self._committee.ballot_above(max(self._highest, self._acceptor.promised), self.me)
        except OverflowError:  # somebody lies: honest seats do not come so far
            return
        if not self._acceptor.promise(ballot):
            return
        self._ballot = self._highest = ballot
        self.role, self._promises = Role.PREPARING, {self.me: self._acceptor.accepted}
        self._be_patient(now_s, _ELECTION)
        self._cast(Prepare(ballot=ballot, head=self._disk.head))
        self._count_promises(now_s)

    def _count_promises(self, now_s: float) -> None:
        if self.role is not Role.PREPARING or len(self._promises) < self._committee.need:
            return
        self.leader = self.me
        self._reign = Reign(self._promises.keys() - {self.me}, now_s)
        found = [accepted for accepted in self._promises.values() if accepted is not None]
        self.role = Role.RECOVERING if found else Role.LEADING
        if found:
            # It may have been sealed: it goes first, as it is.
            newest = max(found, key=lambda accepted: accepted.ballot)
            self._propose(newest.record, newest.work, now_s)
        else:
            self.events.append(Leads())
        if self._reign is not None:
            self._beat(self._reign, now_s)

    # ------------------------------------------------------------------------------------------ messages

    def receive(self, seat: str, word: Word, now_s: float) -> None:
        """From a seat or an onlooker, as the transport has proved it."""
        with self._writing(now_s):
            self._receive(seat, word, now_s)

    def _receive(self, seat: str, word: Word, now_s: float) -> None:
        match word:
            case Ping():
                self._pinged(seat, word, now_s)
            case Propose():
                self._proposed_to(seat, word, now_s)
            case Voted():
                self._count_vote(seat, word, now_s)
            case Pong(ballot=ballot):
                if self._reign is not None and ballot == self._ballot and seat in self._committee.seats:
                    self._answers.heard(ballot, now_s)
                    self._reign.heard(seat, word, now_s)
                    self._clocks.heard(seat, word.time_ms, now_s)
                self._catching_up.heard_of(seat, word.head, now_s)
            case Batch():
                self._take(seat, word, now_s)
            case Sealing():
                self._told_of_seal(seat, word, now_s)
            case Follow(after=after):
                self._catching_up.give(seat, after)
            case Nack():
                self._nacked(seat, word, now_s)
            case _:
                self._receive_of_election(seat, word, now_s)

    def _receive_of_election(self, seat: str, word: Word, now_s: float) -> None:
        match word:
            case Canvass():
                self._canvassed(seat, word, now_s)
            case Prepare():
                self._asked_to_promise(seat, word, now_s)
            case _ if seat in self._committee.seats:
                self._elected_by(seat, word, now_s)
            case _:
                pass

    def _elected_by(self, seat: str, word: Word, now_s: float) -> None:
        match word:
            case Aye(highest=highest):
                self._saw(highest)
                self._ayes.add(seat)
                self._count_ayes(now_s)
            case Promise(ballot=ballot, head=head, accepted=accepted):
                if self.role is not Role.PREPARING or (ballot, head) != (self._ballot, self._disk.head):
                    return
                if accepted is not None and not self._may_be_a_vote(accepted):
                    self.events.append(Evidence(seat, "bad promise"))
                    return
                self._clocks.heard(seat, word.time_ms, now_s)
                self._promises[seat] = accepted
                self._count_promises(now_s)
            case _:
                pass

    def _may_be_a_vote(self, accepted: Accepted) -> bool:
        is_older = accepted.ballot < self._ballot and self._committee.owner(accepted.ballot) is not None
        return is_older and accepted.round == self._disk.head + 1 and self._acceptor.follows(accepted.record)

    def _nacked(self, seat: str, nack: Nack, now_s: float) -> None:
        is_void = seat not in self._committee.seats or not self._saw(nack.promised)
        if not is_void and nack.promised > self._ballot and self.role is not Role.FOLLOWING:
            self._step_down(now_s, "outbid")
        self._catching_up.heard_of(seat, nack.head, now_s)

    def _refuse(self, seat: str) -> None:
        self._send(seat, Nack(promised=self._acceptor.promised, head=self._disk.head))

    def _pinged(self, seat: str, ping: Ping, now_s: float) -> None:
        if self._committee.owner(ping.ballot) == seat:
            self._patience.heard(ping.ballot, now_s)
        if self._is_led_by(seat, ping.ballot, now_s):
            head, nonce, time_ms = self._disk.head, self._disk.rests, self._clocks.wall_ms()
            self._send(seat, Pong(ballot=ping.ballot, head=head, nonce=nonce, time_ms=time_ms))
        else:
            self._refuse(seat)
        self._catching_up.heard_of(seat, ping.head, now_s)

    def _canvassed(self, seat: str, canvass: Canvass, now_s: float) -> None:
        self._catching_up.heard_of(seat, canvass.head, now_s)
        if seat == self.leader and canvass.highest >= self._led_by:
            # It has led, and asks: so it leads no more. It is the first to be followed again, if it hears so.
            self.leader = None
            self.wake_s = min(self.wake_s, now_s + self._timing.beat_s * self._rng.uniform(1, 2))
        is_led = self.leader is not None and now_s - self._heard_s <= self._patience.s
        if canvass.head < self._disk.head:
            self._refuse(seat)  # also how one that was dropped, or is newly named, learns of it
        elif seat in self._committee.seats and self._acceptor.may_vote and self._reign is None and not is_led:
            self._saw(canvass.highest)
            self._send(seat, Aye(highest=max(self._highest, self._acceptor.promised)))

    def _asked_to_promise(self, seat: str, prepare: Prepare, now_s: float) -> None:
        head = self._disk.head
        self._catching_up.heard_of(seat, prepare.head, now_s)
        if prepare.head > head or not self._acceptor.may_vote:
            return
        is_owner = self._committee.owner(prepare.ballot) == seat
        if prepare.head < head or not is_owner or not self._acceptor.promise(prepare.ballot):
            self._refuse(seat)
            return
        self._saw(prepare.ballot)
        self._step_down(now_s, "outbid")
        accepted, time_ms = self._acceptor.accepted, self._clocks.wall_ms()
        self._send(seat, Promise(ballot=prepare.ballot, head=head, accepted=accepted, time_ms=time_ms))

    def _proposed_to(self, seat: str, proposed: Propose, now_s: float) -> None:
        self._catching_up.heard_of(seat, proposed.round - 1, now_s)
        if proposed.round > self._disk.head + 1:
            if self._committee.owner(proposed.ballot) == seat:
                self._early = seat, proposed
            return
        if proposed.round <= self._disk.head or not self._is_led_by(seat, proposed.ballot, now_s):
            self._refuse(seat)
            return
        self._vote(seat, proposed)

    def _vote(self, seat: str, proposed: Propose) -> None:
        voted = self._acceptor.accept(proposed)
        self._unvoted = (seat, proposed) if voted == "no vote" else None
        if isinstance(voted, Voted):
            self._send(seat, voted)
        elif voted == "two records":
            self.events.append(Evidence(seat, voted))

    def hold(self, seat: str, proposed: Propose) -> None:
        """The word is being looked at, and comes by `receive` later. Its seal may be there before."""
        if proposed.round == self._disk.head + 1 and self._committee.owner(proposed.ballot) == seat:
            self._unvoted = seat, proposed

    def vote_again(self, now_s: float) -> None:
        """All that the record of the open round names may be here by now: the vote that could not be given
        before, without waiting for its leader to ask again. It follows nobody by that."""
        with self._writing(now_s):
            if self._open is not None:
                if self.me not in self._open.votes:
                    self._vote_for(self._open, now_s)
            elif self._unvoted is not None:
                self._vote(*self._unvoted)

    def _told_of_seal(self, seat: str, word: Sealing, now_s: float) -> None:
        """Takes the record if it is here, and asks for it if not."""
        known = [self._acceptor.accepted, self._unvoted and self._unvoted[1]]
        for one in known:
            if one is not None and one.round == word.head and digest_of(one.record) == word.digest:
                sealed = Sealed(record=one.record, seal=word.seal, work=one.work)
                self._take(seat, Batch(head=word.head, sealed=(sealed,)), now_s)
                return
        self._catching_up.heard_of(seat, word.head, now_s)

    def _take(self, seat: str, batch: Batch, now_s: float) -> None:
        """Seals speak for themselves: whoever brings them."""
        if not self._take_next(batch.sealed, now_s):
            self.events.append(Evidence(seat, "bad seal"))
            return
        self._catching_up.heard_of(seat, batch.head, now_s)
        early = self._early
        if early is not None and early[1].round <= self._disk.head + 1:
            self._early = None
            self._proposed_to(*early, now_s)

    def _take_next(self, batch: Sequence[Sealed], now_s: float) -> bool:
        """False: one is not what it says; those before it are taken. All that one committee has sealed are
        written at once."""
        taken: list[Sealed] = []
        parent = self._disk.head_digest
        for sealed in batch:
            round_, place = self._disk.head + len(taken) + 1, self._acceptor.place(sealed.record)
            if place is not None and place.round < round_:
                continue
            if place is not None and place.round > round_:
                break
            if place is None or place.parent != parent or not self._is_sealed(round_, sealed):
                self._take_all(taken, now_s)
                return False
            taken.append(sealed)
            parent = digest_of(sealed.record)
            if place.names_committee:
                self._take_all(taken, now_s)
                taken = []
        self._take_all(taken, now_s)
        return True

    def _is_sealed(self, round_: int, sealed: Sealed) -> bool:
        check = self._signer.check
        return self._committee.has_sealed(self._run_id, round_, sealed.record, sealed.seal, check)

    def _take_all(self, taken: Sequence[Sealed], now_s: float) -> None:
        if taken:
            self._append(*taken)
            self._step_down(now_s, "behind")

    # -------------------------------------------------------------------------------------- small things

    @property
    def _committee(self) -> Committee:
        return self._acceptor.committee

    @property
    def _others(self) -> list[str]:
        return [seat for seat in self._committee.seats if seat != self.me]

    def _append(self, *sealed: Sealed) -> None:
        epoch, first = self._committee.epoch, self._disk.head + 1
        self._disk.append(*sealed)
        if self._committee.epoch != epoch:
            self.leader = None  # of another committee
        self.events.extend(NewRecord(round_) for round_ in range(first, self._disk.head + 1))

    def _cast(self, word: Word) -> None:
        for seat in self._others:
            self._send(seat, word)

    def _be_patient(self, now_s: float, share: float = 1) -> None:
        # Candidates have to be apart, and no further for it where patience is long.
        self.wake_s = now_s + share * (self._patience.s + self._timing.patience_s * self._rng.random())

    def _saw(self, ballot: int) -> bool:
        """Whether it is a ballot of this epoch: others are void."""
        if self._committee.owner(ballot) is None:
            return False
        self._highest = max(self._highest, ballot)
        return True

    def _is_led_by(self, seat: str, ballot: int, now_s: float) -> bool:
        """Follows whoever leads by that ballot; False: it is void, or another was promised more."""
        if self._committee.owner(ballot) != seat or ballot < self._acceptor.promised:
            return False
        self._saw(ballot)
        if seat != self.me:
            self._step_down(now_s, "another leads")
        self.leader, self._led_by, self._heard_s = seat, ballot, now_s
        return True

    def _step_down(self, now_s: float, why: Why) -> None:
        """Follows; nobody in particular, until a leader is heard."""
        if self.role is not Role.FOLLOWING:
            if self._reign is not None:
                self.events.append(StepsDown(why))
            self.role, self.leader = Role.FOLLOWING, None
            self._reign, self._open = None, None
            self._ayes, self._promises = set(), {}
        self._be_patient(now_s)

    @contextmanager
    def _writing(self, now_s: float) -> Iterator[None]:
        """A disk that fails: nobody has heard of what could not be written."""
        try:
            yield
        except OSError as e:
            self._step_down(now_s, "disk")
            self.events.append(DiskFailed(str(e)))
