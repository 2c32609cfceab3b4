"""What a run's losses are measured in."""

from __future__ import annotations

from typing import Any, BinaryIO

from ..protocol.figures import BYTES_PER_TOKEN, bytes_per_token


class LossUnit:
    """Of one run. `unit`: "nats/token"; `held_out`: the run's held-out data, of which only the notes at the
    beginning are read; it is closed."""

    def __init__(self, unit: str, held_out: BinaryIO | None) -> None:
        self._unit = unit
        self._bytes_per_token: float | None = None
        if held_out is not None:
            with held_out:
                self._bytes_per_token = bytes_per_token(held_out) if unit == "nats/token" else None

    def figures(self) -> dict[str, Any]:
        """JSON-able: for whoever shows a loss."""
        return {"loss_unit": self._unit, BYTES_PER_TOKEN: self._bytes_per_token}
