"""What the next record carries beside offers: changes that the owner has ordered, and who orders the run and
who may come in from then on."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.messages import AccessEntry, Change, Changes, CommitteeEntry, Reseated
from ..protocol.settings import Course, in_order
from .orders import CheckStrategy, Order, Ordered, Place, plan


@dataclass(frozen=True, slots=True)
class Taken:
    """For one record; see `CommitBody`."""

    changes: Changes
    committee: CommitteeEntry | None
    reseat: tuple[Reseated, ...]
    access: AccessEntry | None


class PendingChanges:
    """Wait for the record that closes the open round. `check`: of the strategy's options."""

    def __init__(self, check: CheckStrategy) -> None:
        self._check = check
        self._by_key: dict[str, Change] = {}
        self.committee: CommitteeEntry | None = None
        """To be named; the last word counts, as with all of these."""
        self.reseat: dict[str, bytes] = {}
        """Seats that need not rest any more, and their nonces."""
        self.access: AccessEntry | None = None

    def __bool__(self) -> bool:
        return bool(self._by_key or self.committee or self.reseat or self.access)

    def add(self, order: Order, course: Course, place: Place) -> Ordered:
        """`course`: after the newest record. Raises ConfigError, with nothing added."""
        ordered = plan(order, self.course(course), place, self._check)
        self._by_key.update((change.key, change) for change in ordered.changes)
        return ordered

    def course(self, course: Course) -> Course:
        """What holds once they are in the ledger."""
        return course.after(in_order(self._by_key))

    def take(self, named: CommitteeEntry | None) -> Taken:
        """For a record: none waits any more. `named`: the present committee, as a record has it.

        A record that ends the rest of a seat names the committee anew: what the seat has promised to leaders
        of the present epoch it has forgotten, too, and their ballots become void.
        """
        committee, reseat = self.committee, self.reseat
        present = {seat.peer_id for seat in named.seats} if named is not None else set()
        reseated = tuple(Reseated(seat=s, nonce=n) for s, n in sorted(reseat.items()) if s in present)
        if reseated and committee is None and named is not None:
            committee = named.model_copy(update={"recovery": b"", "recovered_with": b""})
        taken = Taken(in_order(self._by_key), committee, reseated, self.access)
        self._by_key, self.committee, self.reseat, self.access = {}, None, {}, None
        return taken
