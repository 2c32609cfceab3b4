"""What is left to say of a node that has ended."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished node knows. `fingerprint` is hex; `held_out`: (round, nats) that this node measured."""

    rounds: int
    fingerprint: str
    held_out: tuple[tuple[int, float], ...]
    sent_bytes: int
    received_bytes: int
    payload_bytes: int
    counted: int
    missed: int
