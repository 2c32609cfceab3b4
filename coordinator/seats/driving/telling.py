"""What nodes and operators hear of a committee: who leads, and what training waits for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from ...protocol.figures import wall_ms
from ...protocol.messages import SeatEntry
from ...quorum.observed import Observed
from ...quorum.seat import Seat
from ..disk import StateDisk
from ..naming import told
from ..watchers import WhoLeads

log = logging.getLogger("thinwire.coordinator")


class Telling:
    """Of one seat. `seat`: its state machine, as it is now; `connected`: other seats; `seats`: the committee
    with its addresses; `folder`: its state folder, as a command would name it."""

    def __init__(
        self,
        me: str,
        folder: Path,
        patience_s: float,
        disk: StateDisk,
        seat: Callable[[], Seat],
        connected: Collection[str],
        seats: Callable[[], tuple[SeatEntry, ...]],
        who: WhoLeads,
    ) -> None:
        self._me, self._folder, self._patience_s = me, folder, patience_s
        self._disk, self._seat, self._connected, self._seats, self._who = disk, seat, connected, seats, who
        self.term = 0
        """The ballot by which somebody leads, or has led last."""
        self.trouble = ""
        """Why this seat does not vote, in words; "": it does."""
        self._led_s = self._majority_s = time.monotonic()
        """When somebody led last; when a majority was connected last."""
        self.observed = Observed(me, self._led_s)
        self._lost = ""
        """What was said of a majority that is lost; "": one is there."""
        self._known: tuple[object, ...] = ()
        """What nodes have to hear at once, when it changes."""

    def waits_for(self) -> str:
        """Why nobody leads, in words; "": somebody does, or is about to."""
        if self.trouble:
            return self.trouble
        now_s = time.monotonic()
        if now_s - self._majority_s >= self._patience_s and (lost := self._lost_majority()):
            return lost
        is_soon = now_s - self._led_s < self._patience_s
        return "" if self._seat().leader is not None or is_soon else "the coordinators elect who leads"

    def _lost_majority(self) -> str:
        """In words; "": it is there."""
        return told(self._disk.committee.seats, self._connected, self._me, str(self._folder))

    def tell_changes(self) -> None:
        """If there are any of which nodes have to hear at once."""
        known = (self._seat().leader, self.term, self._disk.committee.epoch, self.trouble)
        if known != self._known:
            self._known = known
            self.tell()

    def tell(self) -> None:
        """As it is now."""
        leader, now_s = self._seat().leader, time.monotonic()
        if leader is not None:
            self._led_s = now_s
        self.observed.led(leader, self.term, now_s, wall_ms())
        lost = self._lost_majority()
        if not lost:
            self._majority_s = now_s
        waits_for = self.waits_for()
        self._who.tell(leader, self._seats(), waits_for, self.term)
        self._tell_lost("" if not waits_for or self.trouble else lost)

    def _tell_lost(self, lost: str) -> None:
        """Here, where the operator looks: once for each that is missing."""
        if lost == self._lost or self._me not in self._disk.committee.seats:
            return
        if lost:
            log.warning("%s", lost)
        else:
            log.info("a majority of the coordinators is there again")
        self._lost = lost
