"""`thinwire bench step`: what a step of training costs each peer, beside torch's DistributedDataParallel.

Real processes, as users start them, that train the built-in text with the defaults of `decoupled`; nobody
evaluates. Only rounds under way are measured, not the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ....compression.errors import ThinwireError
from ...system.output import to_stderr
from ..network.delayed import Delays
from .ddp import measure_ddp
from .swarm import Plan, measure_swarm

N_PEERS: Final = 4
N_ON_A_LINK: Final = 2
ROUNDS_PER_REPEAT: Final = 40
ROUNDS_ON_A_LINK: Final = 20

SMALL: Final = {"layers": 3, "width": 128, "heads": 4, "context": 64, "batch": 8}
"""ByteGPT of 0.67 million parameters, 512 bytes a step."""
LARGER: Final = {**SMALL, "layers": 6, "width": 256}
"""4.9 million."""
NEXT_TO_NO_COMPUTING: Final = {"context": 2, "batch": 1}
OVERLAP: Final = {"overlap": 1}


def bench_step(n_repeats: int, link: tuple[float, float] | None = None) -> dict[str, Any]:
    """`link`: bytes per second and the round trip in seconds, of every connection; DDP, which would need many
    seconds there, is left out then. Raises ThinwireError."""
    if link is not None:
        return _on_a_link(n_repeats, *link)
    ddp = measure_ddp(dict(SMALL), N_PEERS, n_repeats, ROUNDS_PER_REPEAT)
    decoupled = measure_swarm(_plan(N_PEERS, n_repeats, ROUNDS_PER_REPEAT, SMALL))
    idle = measure_swarm(_plan(N_PEERS, n_repeats, ROUNDS_PER_REPEAT, {**SMALL, **NEXT_TO_NO_COMPUTING}))
    return {
        "peers": N_PEERS,
        "ratio_to_baseline": ddp["step"]["median_s"] / decoupled["round"]["median_s"],
        "ratio_to_baseline_by_cpu_time": ddp["step"]["cpu_s"] / decoupled["round"]["cpu_s"],
        "ddp": ddp,
        "decoupled": decoupled,
        "decoupled, 2 bytes a step": idle,
    }


def _on_a_link(n_repeats: int, bytes_per_s: float, round_trip_s: float) -> dict[str, Any]:
    """A row that the build that is measured cannot run is named on stderr, and left out."""
    rows = {}
    for size, task in {"0.67 M": SMALL, "4.9 M": LARGER}.items():
        for name, strategy in {size: {}, f"{size}, overlap": OVERLAP}.items():
            with Delays(round_trip_s / 2, bytes_per_s) as delays:
                try:
                    rows[name] = measure_swarm(
                        _plan(N_ON_A_LINK, n_repeats, ROUNDS_ON_A_LINK, task, strategy), delays
                    )
                except ThinwireError as e:
                    to_stderr(f"{name} is left out: {e}")
    return {"bytes_per_s": bytes_per_s, "round_trip_s": round_trip_s, "peers": N_ON_A_LINK, **rows}


def _plan(
    n_peers: int,
    n_windows: int,
    window_rounds: int,
    task: Mapping[str, Any],
    strategy: Mapping[str, Any] = {},
) -> Plan:
    sections = {"task": task, "strategy": {"name": "decoupled", **strategy}}
    return Plan(n_peers, sections, n_windows, window_rounds)
