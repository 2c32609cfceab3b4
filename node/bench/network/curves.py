"""Rounds of many volunteers against the payload's size, and against how many they are, for pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, get_args

from .lines import KINDS, MBIT
from .swarm import Topology, simulate

SIZES: Final = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
PEERS: Final = (30, 100, 300, 1_000, 3_000, 10_000)

OF_PEERS: Final = (16, 1_000, 10_000, 100_000)
"""Bytes of the payloads that are drawn against the number of peers: two inside of commits, two fetched."""

COORDINATOR: Final = 1_000 * MBIT


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves of each topology. `own`: bytes per second of the coordinator's line."""

    n_peers: int
    own: float
    n_rounds: int


PANELS: Final = {
    "100 peers, coordinator 100 Mbit/s": Panel(100, 100 * MBIT, 30),
    "100 peers, coordinator 1 Gbit/s": Panel(100, 1_000 * MBIT, 30),
    "1,000 peers, coordinator 1 Gbit/s": Panel(1_000, 1_000 * MBIT, 6),
    "1,000 peers, coordinator 10 Gbit/s": Panel(1_000, 10_000 * MBIT, 6),
}

Figures = dict[str, Any]
"""See `simulate`."""


def by_size() -> dict[str, dict[Topology, dict[int, Figures]]]:
    """Of every panel and topology, by the payload's bytes."""
    return {
        name: {
            topology: {
                n_bytes: simulate(panel.n_peers, n_bytes, topology, panel.own, KINDS, n_rounds=panel.n_rounds)
                for n_bytes in SIZES
            }
            for topology in get_args(Topology)
        }
        for name, panel in PANELS.items()
    }


def by_peers() -> dict[int, dict[int, Figures]]:
    """By the payload's bytes and the number of peers."""
    return {
        n_bytes: {n: simulate(n, n_bytes, "dealt", COORDINATOR, KINDS, n_rounds=5) for n in PEERS}
        for n_bytes in OF_PEERS
    }
