"""How a run, and this seat in it, are shown by a seat that does not lead."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from ..admission import AdmissionControl
from ..blobs import BlobStore
from ..ledger import Ledger
from ..membership import Membership
from ..observe.counters import Counters
from ..observe.loss_unit import LossUnit
from ..observe.refusals import Refusals
from ..observe.run_view import RunView
from ..protocol.settings import parse_settings
from ..quorum.recollection import Recollection
from ..service import open_rounds
from ..state import StateDir
from .council import Council


def view_of(ledger: Ledger, blobs: BlobStore, recollection: Recollection, state: StateDir) -> RunView:
    """As the ledger tells it: who is connected now only the leader knows."""
    derived, now_s = recollection.derived, time.monotonic()
    settings, rejected = parse_settings(ledger.genesis.config), recollection.rejected
    admission = AdmissionControl(ledger, state.token(), state.banned(), state.rules(), _wall_ms, rejected)
    return RunView(
        ledger,
        open_rounds(derived.course, ledger, derived.open_round(), None, now_s),
        Membership(settings.silence_s, frozenset(), now_s),
        derived,
        Counters(),
        rejected,
        Refusals(rejected),
        _wall_ms,
        LossUnit(settings.task.loss_unit, derived.held_out_file()),
        admission.gate,
    )


class Beginning:
    """Of a seat that has not got what the run needs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def status(self, now_s: float) -> dict[str, Any]:
        """JSON-able."""
        settings = parse_settings(self._ledger.genesis.config)
        return {
            "run": settings.run.name,
            "run_id": self._ledger.run_id.hex(),
            "round": self._ledger.head_round,
            "rounds": settings.run.rounds,
            "state": "catching up",
            "peers": [],
        }

    def overview(self, now_s: float) -> dict[str, Any]:
        """JSON-able: nothing to see yet."""
        return self.status(now_s)

    def trend(self, since: int) -> dict[str, Any]:
        """JSON-able: nothing to see yet."""
        return {"stamp": 0}


def status_of(council: Council) -> dict[str, Any]:
    """JSON-able: the seat, and what it knows of the others. `lag`: rounds; `wanted`: how many seats there are
    to be, 0: nobody said."""
    disk, links = council.disk, council.streams.links
    seats, wish = disk.committee.seats, council.wishes()
    rejected: Counter[str] = council.streams.rejected + council.counts
    return {
        "role": council.role,
        "me": council.me,
        "leader": council.seat.leader,
        "term": council.term,
        "head": disk.head,
        "lag": max(0, council.seen_head - disk.head),
        "need": disk.committee.need,
        "epoch": disk.committee.epoch,
        "wanted": wish.n_seats,
        "seats": [{"seat": seat, "connected": seat == council.me or seat in links} for seat in seats],
        "onlookers": [
            {"seat": seat, "lacks": link.enter.lacks, "wants_seat": link.enter.wants_seat}
            for seat, link in links.items()
            if seat not in seats
        ],
        "waits_for": council.waits_for(),
        "payloads_missing": council.provisions.fetcher.n_wanted,
        "rejected": dict(rejected),
    }


def _wall_ms() -> int:
    return time.time_ns() // 10**6
