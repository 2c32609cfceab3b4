"""How far a peer's payload points where those of the others do: a look at everybody, each round, for little.

A payload's score is the mean cosine with the others', over one of the parameters, another one each round:
the sign of its inner product with their sum, each at the same length, so that no payload's scale decides for
the others. Decoding is exact, so every replica finds the same signs, but for those of a score of next to 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...compression.base import Compressor, Payload, Turn
from ...compression.exact import exact_arithmetic
from ..base import Parameter


def mean_cosines(
    compressor: Compressor,
    parameters: Sequence[Parameter],
    payloads: Sequence[Payload],
    turn: Turn,
    round_: int,
) -> list[float]:
    """The scores, from -1 to 1; 0 for a payload that is zero there. `parameters`: those that the payloads are
    about; `turn`: as the compressor counts rounds; `round_`: chooses the parameter.

    Each payload is decoded twice, so that two of them are in memory and not all.
    """
    p = _large(parameters)[round_ % len(_large(parameters))]

    def directions() -> Iterator[Tensor]:
        for payload in payloads:
            with exact_arithmetic():
                sent = compressor.decode_on(p.local.device, [payload[p.name]], [1.0], p.part.entire, turn)
            length = torch.linalg.vector_norm(sent.double())
            yield sent / length.float() if length > 0 else torch.zeros_like(sent)

    total = torch.zeros(p.part.n_global, device=p.local.device)
    for x in directions():
        total += x
    n_others = max(1, len(payloads) - 1)
    return [float(torch.dot(x.double(), (total - x).double())) / n_others for x in directions()]


def cosines(
    compressor: Compressor,
    parameters: Sequence[Parameter],
    payload: Payload,
    others: Sequence[Payload],
    turn: Turn,
    round_: int,
) -> list[float]:
    """How far each of the others points where the payload does, from -1 to 1; else as in `mean_cosines`."""
    p = _large(parameters)[round_ % len(_large(parameters))]

    def decoded(packed: Payload) -> Tensor:
        with exact_arithmetic():
            found = compressor.decode_on(p.local.device, [packed[p.name]], [1.0], p.part.entire, turn)
        length = torch.linalg.vector_norm(found := found.double())
        return found / length if length > 0 else torch.zeros_like(found)

    direction = decoded(payload)
    return [float(torch.dot(direction, decoded(other))) for other in others]


def _large(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Those of at least the mean size: biases and norms say little."""
    total = sum(p.part.n_global for p in parameters)
    return [p for p in parameters if p.part.n_global * len(parameters) >= total]
