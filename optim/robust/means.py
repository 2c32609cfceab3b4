"""Means that a minority of peers cannot drag anywhere: exact, coordinate by coordinate.

    trimmed   the mean of the middle half: a quarter of the weight is left out at either end
    median    the middle value; the mean of both where two are in the middle
    vote      the sign that more weight is for; values of the other sign count as zero

Of compressors that let each peer select its own coefficients a coordinate is a coefficient, and the
statistics are over those that sent it, times their share of the round's weight: so a coefficient that few
send does not grow. Where fewer than three have sent it, the absent ones count as zeros.

Peers weigh as in the mean. The plain implementation, on the CPU for all devices: a sort, and sums in the
order that it gives, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from ...compression.base import Array, Compressor, Packed, Part, Turn
from ...compression.exact import exact_arithmetic, to_float32
from ..parts.clip import Weighing
from ..parts.sender_mean import decode_sender_mean

Aggregate = Literal["mean", "trimmed", "median", "vote", "centred"]

BY_COORDINATE: Final = frozenset(("trimmed", "median", "vote"))

TRIMMED: Final = 0.25
"""Of the weight, at either end."""

FEWEST: Final = 3
"""Senders of a coefficient of which statistics say something."""

COLUMNS: Final = 1 << 16
"""Coordinates at a time."""


def decode_mean(
    kind: str, compressor: Compressor, device: torch.device, packs: Sequence[Packed], w: Weighing, part: Part,
    turn: Turn, sender_floor: float | None = None,
) -> Tensor:  # fmt: skip
    """The round's mean of one parameter, of any kind. float32, 1-d, `part.n_local` long, on the device.

    `sender_floor`: None, or of a mean over the senders of a coefficient.
    """
    if sender_floor is not None:
        mean = decode_sender_mean(compressor, device, packs, w, sender_floor, part, turn)
        if mean is not None:
            return mean
    if kind in BY_COORDINATE:
        return decode_by_coordinate(kind, compressor, packs, w, part, turn).to(device)
    mean = compressor.decode_on(device, packs, w.weights, part, turn)
    return mean if w.dilution == 1.0 else mean.mul_(w.dilution)


def decode_by_coordinate(
    kind: str, compressor: Compressor, packs: Sequence[Packed], w: Weighing, part: Part, turn: Turn
) -> Tensor:
    """On the CPU. The packs were checked; not all weights are zero."""
    kept = [to_float32(k) for k in w.kept] or [1.0] * len(packs)
    entries = [e for p in packs if (e := compressor.entries(p, part)) is not None]
    if len(entries) == len(packs):

        def of_senders(entries: Sequence[tuple[Array, Array]], n: int) -> Tensor:
            value_SC = torch.zeros(len(entries), n)
            sent_SC = torch.zeros(len(entries), n, dtype=torch.bool)
            for i, ((position_E, value_E), k) in enumerate(zip(entries, kept, strict=True)):
                value_SC[i, position_E] = torch.from_numpy(value_E * np.float32(k))
                sent_SC[i, position_E] = True
            return statistic(kind, value_SC, w.whole, sent_SC)

        return compressor.decode_entries(entries, of_senders, part)
    with exact_arithmetic():
        rows = [compressor.decode([p], [1.0], part, turn).mul_(k) for p, k in zip(packs, kept, strict=True)]
        return statistic(kind, torch.stack(rows), w.whole)


def statistic(kind: str, value_SC: Tensor, weights: Sequence[float], sent_SC: Tensor | None = None) -> Tensor:
    """float32 (C,), never -0, of S peers' values: finite float32. `sent_SC`: which are there; None: all."""
    weight_S = torch.tensor(weights, dtype=torch.float64)
    sent_SC = torch.ones_like(value_SC, dtype=torch.bool) if sent_SC is None else sent_SC
    columns = zip(torch.split(value_SC, COLUMNS, 1), torch.split(sent_SC, COLUMNS, 1), strict=True)
    with exact_arithmetic():
        return torch.cat([torch.empty(0), *(_of_columns(kind, v, weight_S, sent) for v, sent in columns)])


def _of_columns(kind: str, value_SC: Tensor, weight_S: Tensor, sent_SC: Tensor) -> Tensor:
    """Sums over peers are sequential, one rounding per operation."""
    value_SC = torch.where(sent_SC, value_SC, 0.0).double() + 0.0  # -0 becomes 0
    sent_SC = sent_SC | (sent_SC.sum(0) < FEWEST)
    weight_SC = torch.where(sent_SC, weight_S[:, None], 0.0)
    of_all, of_senders_C = _running(weight_S[:, None])[-1], _running(weight_SC)[-1]
    found_C = {"trimmed": _trimmed, "median": _median, "vote": _vote}[kind](value_SC, weight_SC, of_senders_C)
    found_C = found_C * (of_senders_C / of_all)
    return torch.where(of_senders_C > 0, found_C, 0.0).float() + 0.0


def _running(weight_SC: Tensor) -> list[Tensor]:
    """The sums of none, one, two ... rows, in order."""
    sums = [torch.zeros_like(weight_SC[0])]
    for weight_C in weight_SC:
        sums.append(sums[-1] + weight_C)
    return sums


def _sorted(value_SC: Tensor, weight_SC: Tensor) -> tuple[Tensor, Tensor]:
    """By value, those of no weight last; equal ones stay in order, so that all machines have the same."""
    absent = weight_SC == 0.0
    order_SC = torch.where(absent, torch.inf, value_SC).sort(dim=0, stable=True).indices
    return value_SC.gather(0, order_SC), weight_SC.gather(0, order_SC)


def _trimmed(value_SC: Tensor, weight_SC: Tensor, total_C: Tensor) -> Tensor:
    value_SC, weight_SC = _sorted(value_SC, weight_SC)
    low_C = total_C * TRIMMED
    high_C = total_C - low_C
    reached, sum_C = _running(weight_SC), torch.zeros_like(total_C)
    for i, value_C in enumerate(value_SC):
        within_C = torch.minimum(reached[i + 1], high_C) - torch.maximum(reached[i], low_C)
        sum_C = sum_C + value_C * within_C.clamp(min=0.0)
    return sum_C / (high_C - low_C)


def _median(value_SC: Tensor, weight_SC: Tensor, total_C: Tensor) -> Tensor:
    value_SC, weight_SC = _sorted(value_SC, weight_SC)
    half_C, reached = total_C * 0.5, _running(weight_SC)
    lower_C, upper_C = torch.zeros_like(total_C), torch.zeros_like(total_C)
    for i, value_C in enumerate(value_SC):
        lower_C = torch.where((reached[i] < half_C) & (reached[i + 1] >= half_C), value_C, lower_C)
        upper_C = torch.where((reached[i] <= half_C) & (reached[i + 1] > half_C), value_C, upper_C)
    return (lower_C + upper_C) * 0.5


def _vote(value_SC: Tensor, weight_SC: Tensor, total_C: Tensor) -> Tensor:
    for_C = _running(torch.where(value_SC > 0, weight_SC, 0.0))[-1]
    against_C = _running(torch.where(value_SC < 0, weight_SC, 0.0))[-1]
    winner_C = (for_C > against_C).double() - (for_C < against_C).double()
    sum_C = _running(torch.where(value_SC * winner_C > 0, value_SC * weight_SC, 0.0))[-1]
    return sum_C / total_C
