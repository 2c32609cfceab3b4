"""How a run, and this seat in it, are shown by a seat that does not lead."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from ..admission import AdmissionControl
from ..blobs import BlobStore
from ..ledger import Ledger
from ..membership import Membership, PeerState
from ..observe.counters import Counters
from ..observe.loss_unit import LossUnit
from ..observe.refusals import Refusals
from ..observe.run_view import RunView
from ..observe.trend import Trend
from ..protocol.figures import wall_ms
from ..protocol.settings import parse_settings
from ..quorum.observed import Observed
from ..quorum.recollection import Recollection
from ..serving.parts import open_rounds
from ..state import StateDir
from .driving.council import Council


def view_of(ledger: Ledger, blobs: BlobStore, recollection: Recollection, state: StateDir) -> RunView:
    """As the ledger tells it: who is connected now only the leader knows."""
    derived, now_s = recollection.derived, time.monotonic()
    settings, rejected = parse_settings(ledger.genesis.config), recollection.rejected
    admission = AdmissionControl(ledger, state.token(), state.banned(), state.rules(), wall_ms, rejected)
    return RunView(
        ledger,
        open_rounds(derived.course, ledger, derived.open_round(), None, now_s),
        Membership(settings.silence_s, frozenset(), now_s),
        derived,
        Counters(),
        rejected,
        Refusals(rejected),
        wall_ms,
        LossUnit(settings.task.loss_unit, derived.held_out_file()),
        admission.gate,
    )


_NOT_KNOWN: Final = (
    "n_params", "left_s", "loss", "round_s", "payload_bytes", "sent_bytes", "ddp_bytes", "last_commit_ms"
)  # fmt: skip


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
        """JSON-able: as `RunView.overview`, of a run of which nothing is known yet."""
        nothing = dict.fromkeys(_NOT_KNOWN)
        counts = {"waits_for": 0, "missing": 0, "mismatches": 0, "n_peers": dict.fromkeys(PeerState, 0)}
        lists: dict[str, list[Any]] = {name: [] for name in ("peers", "evaluations", "entries", "happenings")}
        return {**nothing, **counts, **lists, "strategy": "", **self.status(now_s)}

    def trend(self, since: int) -> dict[str, Any]:
        """JSON-able: no points yet."""
        return {"stamp": 0, **Trend(1).points(since)}


def status_of(council: Council) -> dict[str, Any]:
    """JSON-able: the seat, and what it knows of the others. `lag`: rounds; `wanted`: how many seats there are
    to be, 0: nobody said."""
    disk, links, observed = council.disk, council.streams.links, council.telling.observed
    seats, wish = disk.committee.seats, council.candidates.wishes()
    rejected: Counter[str] = council.streams.rejected + council.counts
    role = council.role
    return {
        "peer_id": council.me,
        "role": role,
        "term": council.telling.term,
        "head": disk.head,
        "lag": max(0, council.seen_head - disk.head),
        "need": disk.committee.need,
        "epoch": disk.committee.epoch,
        "wanted": wish.n_seats,
        "seats": observed.seats(seats, links.keys(), council.seat.resting, disk.head, role),
        "onlookers": [
            {"peer_id": seat, "lacks": link.enter.lacks, "wants_seat": link.enter.wants_seat}
            for seat, link in links.items()
            if seat not in seats
        ],
        "waits_for": council.telling.waits_for(),
        "trouble": council.telling.trouble,
        "payloads_missing": council.provisions.fetcher.n_wanted,
        "rejected": dict(rejected),
        **observed.figures(time.monotonic()),
        "leader": council.seat.leader,
    }


def status_alone(me: str, since_ms: int, head: int) -> dict[str, Any]:
    """JSON-able: the same of a coordinator that orders its run alone, since then."""
    now_s = time.monotonic()
    observed = Observed(me, now_s)
    observed.led(me, 0, now_s, since_ms)
    return {
        "peer_id": me,
        "role": "leads",
        "term": 0,
        "head": head,
        "lag": 0,
        "need": 1,
        "wanted": 0,
        "seats": observed.seats((me,), (), (), head, "leads"),
        "onlookers": [],
        "waits_for": "",
        "payloads_missing": 0,
        "refused": {},
        **observed.figures(now_s),
    }


def for_the_page(seat: Mapping[str, Any]) -> dict[str, Any] | None:
    """JSON-able, of a status's `seat`: what the page shows; nothing in it changes by time alone. None: this
    coordinator orders the run alone, and is to."""
    if len(seat["seats"]) < 2 and not seat["wanted"] and seat["role"] == "leads":
        return None
    kept = ("peer_id", "role", "leader", "since_ms", "elections", "need", "wanted", "waits_for", "seats")
    onlookers = [{"id": each["peer_id"][-6:], "lacks": each["lacks"]} for each in seat["onlookers"]]
    return {name: seat[name] for name in kept} | {"onlookers": onlookers}
