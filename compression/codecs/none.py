"""Nothing is exchanged: what a peer would reach alone. A baseline for training without a swarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..base import Compressor, Field, Packed, Part, Turn
from ..errors import ConfigError
from .dense import Dense


@dataclass(frozen=True, slots=True)
class Nothing(Compressor):
    """0 bytes: what is packed stays on this machine, as it is, and is refused wherever it would be sent."""

    def fields(self, part: Part) -> tuple[Field, ...]:
        """Raises ConfigError: no swarm and no process group can send this."""
        raise ConfigError(
            "compressor none exchanges nothing: it is for one peer that trains alone, with step(). "
            "Choose another compressor for a swarm, or leave out the swarm"
        )

    def pack(self, x: Tensor, part: Part, turn: Turn) -> Packed:
        return Dense().pack(x, part, turn)

    def check(self, packed: Packed, part: Part, turn: Turn) -> None:
        Dense().check(packed, part, turn)

    def decode(self, packs: Sequence[Packed], weights: Sequence[float], part: Part, turn: Turn) -> Tensor:
        """Raises ConfigError for the packs of more than one peer."""
        if len(packs) > 1:
            raise ConfigError(f"compressor none exchanges nothing, but there are packs of {len(packs)} peers")
        return Dense().decode(packs, weights, part, turn)

    def magnitude(self, packed: Packed, part: Part, turn: Turn) -> float:
        return Dense().magnitude(packed, part, turn)
