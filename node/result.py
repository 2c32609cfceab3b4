"""What a node hands back when its part in a run has ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """Of one start of a node. `rounds`: the last one that its replica has applied; `fingerprint`: in hex.

    `held_out`: (round, loss) that this node measured. `sent_bytes`, `received_bytes`: over all
    streams, heartbeats left out; `payload_bytes`: of own payloads, each once. `counted`: own offers that were
    in their round's commit, with a payload that passed the check; `missed`: those that were not. `loss_unit`,
    `bytes_per_token`: for people, see `units.human_loss`.
    """

    rounds: int
    fingerprint: str
    held_out: tuple[tuple[int, float], ...]
    sent_bytes: int
    received_bytes: int
    payload_bytes: int
    counted: int
    missed: int
    loss_unit: str = "nats"
    bytes_per_token: float | None = None
