"""The mean over those that sent a coefficient, as DeMo's program takes it: exact.

For compressors that let each peer select its own coefficients; others' are sent by all or by none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...compression.base import Array, Compressor, Packed, Part


def decode_sender_mean(
    compressor: Compressor, packs: Sequence[Packed], weights: Sequence[float], part: Part
) -> Tensor | None:
    """Per coefficient the sum over the packs in order, times their weights, divided by how many have it; then
    the inverse.

    The packs were checked, weights are float32 values. Returns float32, 1-d, `part.n_local` long, on the CPU;
    None where all peers send the same coefficients, so that the mean over their senders is the mean over all.
    """
    entries = [e for p in packs if (e := compressor.entries(p, part)) is not None]
    if len(entries) < len(packs):
        return None

    def mean(entries: Sequence[tuple[Array, Array]], n: int) -> Tensor:
        """float32 (n,); 0 where nobody sent anything."""
        sum_C = np.zeros(n, dtype=np.float32)
        n_senders_C = np.zeros(n, dtype=np.float32)
        for (position_E, value_E), w in zip(entries, weights, strict=True):
            # Nobody has a position twice: reading, adding and writing back has one order only.
            sum_C[position_E] = sum_C[position_E] + value_E * np.float32(w)
            n_senders_C[position_E] += 1
        return torch.from_numpy(sum_C) / torch.from_numpy(np.maximum(n_senders_C, 1))

    return compressor.decode_entries(entries, mean, part)
