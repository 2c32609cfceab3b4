"""`thinwire bench network`: rounds of 100, 1,000 and 10,000 volunteers in modelled time, by who gives
payloads to whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, get_args

from ...system.output import to_stderr
from .lines import HOME, KINDS, MBIT, Kind
from .swarm import Topology, simulate

ROUNDS_PER_REPEAT: Final = 2


@dataclass(frozen=True, slots=True)
class Scenario:
    """`own`: bytes per second of the coordinator's line."""

    n_peers: int
    n_bytes: int
    own: float
    compute_s: float = 10.0
    kinds: tuple[Kind, ...] = KINDS
    n_rounds: int | None = None
    """None: by how often it is to be measured."""


SCENARIOS: Final = {
    "100 peers, 10 kB, coordinator 100 Mbit/s": Scenario(100, 10_000, 100 * MBIT),
    "100 peers, 100 kB, coordinator 100 Mbit/s": Scenario(100, 100_000, 100 * MBIT),
    "100 peers, 1 MB, coordinator 100 Mbit/s": Scenario(100, 1_000_000, 100 * MBIT),
    "100 peers, 1 MB, coordinator 1 Gbit/s": Scenario(100, 1_000_000, 1000 * MBIT),
    "100 peers, 1 MB, coordinator 10 Gbit/s": Scenario(100, 1_000_000, 10_000 * MBIT),
    "1,000 peers, 10 kB, coordinator 1 Gbit/s": Scenario(1000, 10_000, 1000 * MBIT),
    "1,000 peers, 100 kB, coordinator 1 Gbit/s": Scenario(1000, 100_000, 1000 * MBIT),
    "10,000 peers, 10 kB, coordinator 1 Gbit/s": Scenario(10_000, 10_000, 1000 * MBIT),
    "10,000 peers, 100 kB, coordinator 1 Gbit/s": Scenario(10_000, 100_000, 1000 * MBIT),
    "10,000 peers, 100 kB, coordinator 10 Gbit/s": Scenario(10_000, 100_000, 10_000 * MBIT),
    "1 B model, 100 peers of 20 Mbit/s, 9.9 MB, coordinator 1 Gbit/s": Scenario(
        100, 9_900_000, 1000 * MBIT, 60.0, HOME
    ),
    "1 B model, 100 peers of 20 Mbit/s, 9.9 MB, coordinator 10 Gbit/s": Scenario(
        100, 9_900_000, 10_000 * MBIT, 60.0, HOME
    ),
}
"""9.9 MB: of `decoupled`, 32 of 4096 coefficients of 10.1 bits."""

INLINE: Final = {
    "100 peers": Scenario(100, 16, 1000 * MBIT),
    "1,000 peers": Scenario(1000, 16, 1000 * MBIT),
    "10,000 peers": Scenario(10_000, 16, 1000 * MBIT),
}
"""16 bytes, inside of commits: nobody gives anything to anybody."""

CHURN: Final = Scenario(1000, 100_000, 1000 * MBIT, n_rounds=200)
"""Long enough for every third peer to be another one in the end."""


def bench_network(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """A row of `command.BENCHES`."""
    del n_params, device
    n_rounds = ROUNDS_PER_REPEAT * n_repeats
    by_bytes = {
        name: {topology: _figures(scenario, topology, n_rounds, name) for topology in get_args(Topology)}
        for name, scenario in SCENARIOS.items()
    }
    inline = {name: _figures(scenario, "dealt", n_rounds, name) for name, scenario in INLINE.items()}
    long = {f"{CHURN.n_rounds} rounds": _figures(CHURN, "dealt", n_rounds, "200 rounds")}
    return {**by_bytes, "16 bytes, coordinator 1 Gbit/s": inline, "1,000 peers, 100 kB": long}


def _figures(scenario: Scenario, topology: Topology, n_rounds: int, name: str) -> dict[str, Any]:
    found = simulate(
        scenario.n_peers,
        scenario.n_bytes,
        topology,
        scenario.own,
        scenario.kinds,
        compute_s=scenario.compute_s,
        n_rounds=scenario.n_rounds or n_rounds,
    )
    to_stderr(f"{name}, {topology}: a round takes {found['round_s']:.3g} s")
    return found
