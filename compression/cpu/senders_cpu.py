"""The numba kernel of means over senders: several packs become one that says the means, bit for bit.

What is decoded from that one pack, with a weight of 1, is what the means stand for: the kernels that decode
need to know nothing of senders.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..base import Senders
from ..compiled import compiled
from .update_cpu import ZERO, Mean

Array = Any
"""A numpy array inside a kernel; numba finds the types."""


def merged(mean: Mean, senders: Senders) -> Mean:
    """One pack with every coefficient that anybody sent, as `Compressor.decode_senders` has it. `mean`: of
    the packs; its `inverse` is not used."""
    position_E, value_E = np.empty_like(mean.position_E), np.empty_like(mean.value_E)
    offset_WG = np.empty((1, mean.offset_WG.shape[1]), dtype=np.int64)
    whole_W = np.array(senders.weights, dtype=np.float32)
    packs = mean.position_E, mean.value_E, mean.offset_WG, mean.weight_W, whole_W
    n = merge(*packs, np.float32(senders.least), mean.n_coefficients, position_E, value_E, offset_WG[0])
    if n < 0:
        raise IndexError("a coefficient past the end of its group: the packs were not checked")
    one = np.ones(1, dtype=np.float32)
    return replace(
        mean,
        position_E=position_E[:n],
        value_E=value_E[:n],
        offset_WG=offset_WG,
        weight_W=one,
        inverse=one[0],
    )


@compiled
def merge(
    position_E: Array, value_E: Array, offset_WG: Array, weight_W: Array, whole_W: Array, least: Any,
    n_coefficients: int, position_M: Array, value_M: Array, offset_G: Array,
) -> Any:  # fmt: skip
    """Writes the means, group by group, and returns how many they are; -1 if there is no such coefficient."""
    sums, wholes = np.zeros(n_coefficients, np.float32), np.zeros(n_coefficients, np.float32)
    is_sent = np.zeros(n_coefficients, np.bool_)
    n = 0
    for g in range(offset_WG.shape[1] - 1):
        offset_G[g] = n
        here = g * n_coefficients
        for w in range(weight_W.size):
            for e in range(offset_WG[w, g], offset_WG[w, g + 1]):
                i = position_E[e] - here
                if i < 0 or i >= n_coefficients:
                    return -1
                sums[i] += value_E[e] * weight_W[w]
                wholes[i] += whole_W[w]
                if not is_sent[i]:
                    is_sent[i] = True
                    position_M[n] = position_E[e]
                    n += 1
        for m in range(offset_G[g], n):
            i = position_M[m] - here
            value_M[m] = sums[i] / max(wholes[i], least)
            sums[i], wholes[i], is_sent[i] = ZERO, ZERO, False
    offset_G[offset_G.size - 1] = n
    return n
