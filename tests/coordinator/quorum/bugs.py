"""Bugs that are planted on purpose: a simulation that does not find them proves nothing."""

from __future__ import annotations

from typing import Final

from tests.coordinator.quorum.stand_ins import Disk
from tests.coordinator.quorum.world import Bug
from thinwire.coordinator.protocol.trust.seals import Sealed
from thinwire.coordinator.quorum.acceptor import Acceptor
from thinwire.coordinator.quorum.disk import VoteState
from thinwire.coordinator.quorum.seat import Seat
from thinwire.coordinator.quorum.words import Accepted, Pong, Word


class _NoPromise(Acceptor):
    @property
    def promised(self) -> int:
        return 0


class _IgnoresPromise(Seat):
    """Votes for any ballot."""

    acceptor = _NoPromise


class _NoRecovery(Seat):
    """Leads without a look at what others have voted for."""

    def _count_promises(self, now_s: float) -> None:
        self._promises = dict[str, Accepted | None].fromkeys(self._promises)
        super()._count_promises(now_s)


class _RecoversLowest(Seat):
    """Proposes the vote of the lowest ballot again, not of the highest."""

    def _count_promises(self, now_s: float) -> None:
        if len(self._promises) >= self._committee.need:
            votes = [(vote.ballot, seat) for seat, vote in self._promises.items() if vote is not None]
            for _, seat in sorted(votes)[1:]:
                self._promises[seat] = None
        super()._count_promises(now_s)


class _LowersPromise(Acceptor):
    def promise(self, ballot: int) -> bool:
        self._disk.save_vote(VoteState(self.committee.epoch, ballot, self.accepted))
        return True


class _MixesEpochs(Seat):
    """The next ballot is above the highest that was heard of, also where that is of another epoch."""

    acceptor = _LowersPromise

    def _saw(self, ballot: int) -> bool:
        self._highest = max(self._highest, ballot)
        return self._committee.owner(ballot) is not None


class _ForgetsResting(Seat):
    """Knows who rests only until the next record, and only from who has the newest one."""

    def _receive(self, seat: str, word: Word, now_s: float) -> None:
        if isinstance(word, Pong) and word.head != self._disk.head:
            word = Pong(ballot=word.ballot, head=word.head, nonce=None)
        super()._receive(seat, word, now_s)

    def _append(self, *sealed: Sealed) -> None:
        self.resting.clear()
        super()._append(*sealed)


def _forget_promise(disk: Disk) -> None:
    disk.vote = VoteState(disk.vote.epoch, 0, disk.vote.accepted)


def _forget_accept(disk: Disk) -> None:
    disk.vote = VoteState(disk.vote.epoch, disk.vote.promised, None)


def _lose_last_write(disk: Disk) -> None:
    disk.vote = disk.vote_before


BUGS: Final[dict[str, Bug]] = {
    "forgets_promise": Bug(forget=_forget_promise),
    "ignores_promise": Bug(_IgnoresPromise),
    "forgets_accept": Bug(forget=_forget_accept),
    "no_recovery": Bug(_NoRecovery),
    "recovers_lowest": Bug(_RecoversLowest),
    "mixes_epochs": Bug(_MixesEpochs),
    "forgets_resting": Bug(_ForgetsResting),
    "no_fsync": Bug(forget=_lose_last_write),
    "old_copy": Bug(),  # the world's matter
}
