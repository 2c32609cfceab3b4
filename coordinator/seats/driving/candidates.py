"""Who is to be in the next committee, as the operators of all seats want it: said by who leads, once all of
them are ready."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ...protocol.messages import CommitteeEntry
from ..directory import Directory
from ..disk import StateDisk
from ..link import Link
from ..naming import Wish, entry_of, next_seats
from .owner import Owner

log = logging.getLogger("thinwire.coordinator")


class Candidates:
    """As one seat sees them. `wish`: of its own operator, as it is now."""

    def __init__(
        self,
        disk: StateDisk,
        links: Mapping[str, Link],
        directory: Directory,
        owner: Owner,
        wish: Callable[[], Wish],
    ) -> None:
        self._disk, self._links, self._directory, self._owner = disk, links, directory, owner
        self._wish = wish
        self._named: CommitteeEntry | None = None
        self._awaited = (0, 0)

    def begin_anew(self) -> None:
        """Nobody has been named since: there is another leader, or another committee."""
        self._named = None

    def name(self) -> None:
        """The next committee, once it is wanted and everybody in it is ready. Asked of who leads."""
        committee, links = self._disk.committee, self._links
        ready = [link for link in links.values() if link.enter.wants_seat and not link.enter.lacks]
        ready.sort(key=lambda link: link.began_s)
        wish = self.wishes()
        seats = next_seats(committee.seats, [link.seat for link in ready], wish.n_seats, wish.all_drops)
        if seats is None:
            self._tell_awaited(wish.n_seats - len(committee.seats), len(ready))
            return
        entry = entry_of(seats, self._directory.addresses(), self._owner.recovery())
        if entry != self._named:
            self._named = entry
            self._owner.name_committee(entry)

    def _tell_awaited(self, n_missing: int, n_ready: int) -> None:
        """Once for each number."""
        if n_missing > 0 and self._awaited != (n_missing, n_ready):
            self._awaited = n_missing, n_ready
            text = "%d more coordinators are to be named, %d are up to date: this one goes on meanwhile"
            log.info(text, n_missing, n_ready)

    def wishes(self) -> Wish:
        """What the operators of all seats want; one who looks on may say whose place it is to take."""
        seats = self._disk.committee.seats
        of_others = [
            Wish(link.enter.n_seats if link.seat in seats else 0, link.enter.drops)
            for link in self._links.values()
        ]
        return Wish.all_of([self._wish(), *of_others])
