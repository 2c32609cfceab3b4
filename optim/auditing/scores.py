"""How far a peer's payload points where those of the others do: a look at everybody, each round, for little.

A payload's score is the mean cosine with the others', over one of the parameters, another one each round:
the sign of its inner product with their sum, each at the same length, so that no payload's scale decides for
the others. Decoding is exact, so every replica finds the same signs, but for those of a score of next to 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from ...compression.base import Compressor, Payload, Turn
from ...compression.exact import exact_arithmetic
from ..base import Parameter

MOST_KEPT: Final = 2**22
"""Elements of all payloads together that are decoded once."""


def scored_parts(parameters: Sequence[Parameter], payloads: Sequence[Payload], round_: int) -> list[Payload]:
    """What `mean_cosines` needs of payloads, in memory of their own."""
    name = _chosen(parameters, round_).name
    return [{name: tuple(t.clone() for t in payload[name])} for payload in payloads]


def mean_cosines(
    compressor: Compressor,
    parameters: Sequence[Parameter],
    parts: Sequence[Payload],
    turn: Turn,
    round_: int,
) -> list[float]:
    """The scores, from -1 to 1; 0 for a payload that is zero there. `parameters`: those that the payloads are
    about; `parts`: their `scored_parts`; `turn`: as the compressor counts rounds; `round_`: chooses the
    parameter.

    Where they are large each payload is decoded twice, so that two of them are in memory and not all.
    """
    p = _chosen(parameters, round_)

    def decoded() -> Iterator[Tensor]:
        for part in parts:
            sent = compressor.decode_on(p.local.device, [part[p.name]], [1.0], p.part.entire, turn)
            length = torch.linalg.vector_norm(sent.double())
            yield sent / length.float() if length > 0 else torch.zeros_like(sent)

    total, n_others = torch.zeros(p.part.n_global, device=p.local.device), max(1, len(parts) - 1)
    with exact_arithmetic():
        directions = list(decoded()) if len(parts) * total.numel() <= MOST_KEPT else None
        for x in directions or decoded():
            total += x
        return [
            float(torch.dot(x.double(), (total - x).double())) / n_others for x in directions or decoded()
        ]


def cosines(
    compressor: Compressor,
    parameters: Sequence[Parameter],
    payload: Payload,
    others: Sequence[Payload],
    turn: Turn,
    round_: int,
) -> list[float]:
    """How far each of the others points where the payload does, from -1 to 1; else as in `mean_cosines`."""
    p = _chosen(parameters, round_)

    def decoded(packed: Payload) -> Tensor:
        with exact_arithmetic():
            found = compressor.decode_on(p.local.device, [packed[p.name]], [1.0], p.part.entire, turn)
        length = torch.linalg.vector_norm(found := found.double())
        return found / length if length > 0 else torch.zeros_like(found)

    direction = decoded(payload)
    return [float(torch.dot(direction, decoded(other))) for other in others]


def _chosen(parameters: Sequence[Parameter], round_: int) -> Parameter:
    """One of those of at least the mean size: biases and norms say little."""
    total = sum(p.part.n_global for p in parameters)
    large = [p for p in parameters if p.part.n_global * len(parameters) >= total]
    return large[round_ % len(large)]
