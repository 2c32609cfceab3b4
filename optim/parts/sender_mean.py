"""The mean over those that sent a coefficient, as DeMo's program takes it and SparseLoCo's: exact.

    sum of w q over the senders / max(W of the senders, floor times W of all)

w is what a payload counts for after the bound, W what its peer weighs: one that was scaled down keeps its
weight. With a floor of f, what a single peer sends grows by 1 / f at most against the mean over all, however
many do not send it: with a bound of b, no peer moves the model by more than b / f times what the median peer
would in that mean. A floor of 1 is the mean over all. 0 is what older runs have: senders are counted alike.

For compressors that let each peer select its own coefficients; others' are sent by all or by none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...compression.base import Compressor, Packed, Part, Senders, Turn
from ...compression.exact import exact_arithmetic, to_float32
from .clip import Weighing, total


def decode_sender_mean(
    compressor: Compressor,
    device: torch.device,
    packs: Sequence[Packed],
    w: Weighing,
    floor: float,
    part: Part,
    turn: Turn,
) -> Tensor | None:
    """Of one parameter, of packs that were checked. Returns float32, 1-d, `part.n_local` long, on the device.

    None where it is the mean over all: all peers send the same coefficients, or nobody weighs anything.
    """
    senders = senders_of(w, floor)
    if senders is None:
        return None
    with exact_arithmetic():
        return compressor.decode_senders(device, packs, w.weights, senders, part, turn)


def senders_of(w: Weighing, floor: float) -> Senders | None:
    """None if nobody weighs anything."""
    if floor == 0.0:
        return Senders([1.0] * len(w.weights), 1.0)
    least = to_float32(floor * total(w.whole))
    return Senders(w.whole, least) if least > 0.0 else None
