"""What goes from neighbour to neighbour: a peer's model or its changes, packed. Checked before use.

A message is the bytes of a payload (compression/wire.py) of one round, with a layout that names the model and
the method: what another version, model or method sends is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...compression import wire
from ...compression.base import Compressor, Field, Fields, Packed, Turn
from ...compression.exact import exact_arithmetic
from ..base import Parameter, wholes


class Messages:
    """Of one format. `what`: is in the layout; `extra`: tensors beside the packs, name -> what is expected;
    their names have a colon, which no parameter's has."""

    def __init__(
        self,
        what: str,
        compressor: Compressor,
        parameters: list[Parameter],
        extra: Mapping[str, Field] | None = None,
    ) -> None:
        self._compressor, self._parameters, self._extra = compressor, parameters, dict(extra or {})
        packs = {p.name: compressor.fields(p.part.entire) for p in parameters}
        self._fields: Fields = {**packs, **{name: (field,) for name, field in self._extra.items()}}
        shapes = [(p.name, p.part.shape) for p in parameters]
        self._layout = wire.layout_hash(f"gossip {what} {compressor!r} {shapes}".encode())
        self._max_bytes = wire.max_bytes_of(self._fields)

    def encode(self, packs: Mapping[str, Packed], extra: Mapping[str, Tensor], turn: Turn) -> bytes:
        """`extra`: as the constructor says."""
        payload = {**packs, **{name: (t,) for name, t in extra.items()}}
        return wire.encode(payload, self._fields, turn.round, self._layout)

    def decode(self, data: bytes, turn: Turn) -> tuple[dict[str, Packed], dict[str, Tensor]]:
        """Packs, and what is beside them, of the turn's round. Raises BadPayload."""
        payload = wire.decode(data, self._fields, turn.round, self._layout, self._max_bytes)
        with exact_arithmetic():
            self._compressor.check_all(payload, wholes(self._parameters), turn)
        extra = {name: payload[name][0] for name in self._extra}
        return {p.name: payload[p.name] for p in self._parameters}, extra
