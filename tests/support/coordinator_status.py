"""A coordinator's status as it would be, and what a scrape of it shows."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry

from thinwire.coordinator.observe.counters import Counters
from thinwire.coordinator.observe.metrics import register
from thinwire.coordinator.protocol.exposition import text_of
from thinwire.coordinator.quorum.observed import Observed


def status_of(n_peers: int = 3, **changes: Any) -> dict[str, Any]:
    """As `CoordinatorServer.status` has it."""
    states = ["training", "training", "gone"]
    peers = [
        {
            "peer_id": f"12D3Koo{i}",
            "state": states[i % 3],
            "offers_counted": 5,
            "offers_missed": 1,
            "offers_empty": 2,
            "size": (1.5, None, 99.0)[i % 3],
            "clipped": (0.25, None, 1.0)[i % 3],
            "audits_passed": 3,
            "audits_failed": i % 3,
            "condemned_until": (None, 70, None)[i % 3],
            "rejected": {"samples": 2} if i == 0 else {},
        }
        for i in range(n_peers)
    ]
    counters = Counters()
    counters.round_closed("complete", 0.2)
    counters.round_closed("deadline", 0.05)
    counters.round_closed("complete", 1000.0)
    counters.joined["new"] += 3
    counters.left["connection_lost"] += 1
    return {
        "round": 7,
        "rounds": 20,
        "state": "training",
        "last_commit_ms": 1_700_000_000_500,
        "loss": 2.25,
        "held_out": [[0, 5.5], [5, 2.5]],
        "noise_scale": {"samples": 4096.0, "peers": 32.0, "rounds": 3, "of": "momentum"},
        "peers": peers,
        "rejected": {"late_offer": 2},
        "since_start": counters.figures(),
        "ledger_bytes": 40960,
        "disk_free_bytes": 10**10,
        "payload_bytes": 1500,
        "payload_bytes_per_peer_round": 100.0,
        "ddp_bytes_per_peer_round": 25_000.0,
        "mismatches": 1,
        "payloads": {"bytes": 900, "quota_bytes": 10**9},
        "snapshot": {"round": 5, "bytes": 100, "holders": 2},
        "coordinator": {
            "sent_bytes": {"payload": 1, "control": 2},
            "received_bytes": {"payload": 30, "control": 4},
        },
        "seat": seat_of(),
        **changes,
    }


def seat_of(role: str = "leads", *, seats: int = 3, reachable: int = 2, **changes: Any) -> dict[str, Any]:
    """As its `seat` of several, of the first of them."""
    ids = [f"12D3KooWseat{i}" for i in range(seats)]
    observed = Observed(ids[0], 0.0)
    observed.led(None, 0, 1.5, 0)
    observed.led(ids[0] if role == "leads" else ids[1], 7, 2.0, 1_700_000_000_000)
    observed.heard(ids[1], 7 if role == "leads" else 9)
    for took_s in (0.02, 0.02, 1000.0):
        observed.sealed(took_s)
    head = 9 if role == "leads" else 7
    return {
        "peer_id": ids[0],
        "role": role,
        "term": 7,
        "head": head,
        "lag": 9 - head,
        "need": seats // 2 + 1,
        "wanted": seats,
        "seats": observed.seats(ids, set(ids[1:reachable]), (), head, role),
        "onlookers": [],
        "waits_for": "",
        "payloads_missing": 4,
        "refused": {"payload": 3, "work": 1},
        **observed.figures(10.0),
        **changes,
    }


def scrape(status: dict[str, Any]) -> str:
    registry = CollectorRegistry()
    register(registry, lambda: status)
    return text_of(registry).decode()
