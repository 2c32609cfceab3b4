"""Record 0 of runs that are measured: a model of one parameter, which nobody trains."""

from __future__ import annotations

import json

from ...coordinator.protocol.figures import wall_ms
from ...coordinator.protocol.messages import PROTOCOL_VERSION, GenesisBody, LayoutEntry, Limits
from ...coordinator.protocol.schedule import float32_bits


def genesis_of(coordinator: str, n_peers: int, n_rounds: int) -> GenesisBody:
    """Record 0 of a run whose rounds close with the last peer."""
    config = {
        "run": {
            "name": "bench",
            "rounds": n_rounds,
            "min_peers": n_peers,
            "eval_every": n_rounds + 1,
            "verify_every": n_rounds,
            "snapshot_every": n_rounds,
        },
        "policy": {"name": "all"},
        "schedule": {"name": "constant", "warmup_rounds": 0, "final_factor": 1.0},
        "network": {"heartbeat_s": 1.0},
    }
    return GenesisBody(
        protocol=PROTOCOL_VERSION,
        config=json.dumps(config),
        layout=(LayoutEntry(name="w", shape=(1,), dtype="float32", init="zeros", scale=0.0),),
        base=None,
        held_out=None,
        corpus=None,
        limits=Limits(max_peers=max(64, n_peers)),
        coordinator=coordinator,
        lr_factor_bits=float32_bits(1.0),
        time_ms=wall_ms(),
    )
