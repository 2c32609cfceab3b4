"""Updates of parameters whose packs a test has, without payloads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from thinwire.compression.base import Compressor, Packed, Part, Payload, Senders, Step, Target, Turn


@dataclass(frozen=True, slots=True)
class Updated:
    """What takes a step by everybody's packs of it, see `Target`."""

    x: Tensor
    part: Part
    packs: Sequence[Packed]
    step: Step


def update(
    compressor: Compressor,
    updated: Sequence[Updated],
    weights: Sequence[float],
    turn: Turn,
    senders: Senders | None = None,
) -> None:
    compressor.fused_update(*targets_of(updated), weights, turn, senders)


def targets_of(updated: Sequence[Updated]) -> tuple[list[Target], list[Payload]]:
    """Under names of their own; the payloads have nothing else."""
    targets = [Target(u.x, u.part, str(i), u.step) for i, u in enumerate(updated)]
    packs = zip(*(u.packs for u in updated), strict=True)
    return targets, [{t.name: packed for t, packed in zip(targets, each, strict=True)} for each in packs]
