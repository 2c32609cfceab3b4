"""The numba kernel of `fingerprint`: the same sums, near the speed of memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..compiled import compiled
from ..numerics.splitmix64 import GOLDEN, LAST_SHIFT, MIX
from .threads import share

if TYPE_CHECKING:  # whoever asks for `cache_folder` may do without torch
    from torch import Tensor

_GOLDEN: Final = np.uint64(GOLDEN)
_SHIFTS: Final = (np.uint64(MIX[0][0]), np.uint64(MIX[1][0]), np.uint64(LAST_SHIFT))
_FACTORS: Final = (np.uint64(MIX[0][1]), np.uint64(MIX[1][1]))


def parameter_sum(bits: Tensor, start: int) -> int:
    """As `fingerprint.parameter_sum_torch`. `bits`: flat contiguous int32 or int16 on the CPU."""
    patterns = bits.numpy().view(np.uint32 if bits.dtype.itemsize == 4 else np.uint16)
    first = np.uint64(start)
    sums = share(lambda a, b: _sum(patterns, first, a, b), 0, patterns.size, smallest=1 << 18)
    return sum(int(s) for s in sums) & ((1 << 64) - 1)


@compiled
def _sum(patterns: Any, start: Any, first: int, last: int) -> Any:
    here = patterns[first:last]  # an index that may be negative, for all the compiler knows, makes no vectors
    begin = start + np.uint64(first)
    total = np.uint64(0)
    for i in range(here.size):
        h = ((begin + np.uint64(i)) * _GOLDEN) ^ np.uint64(here[i])
        h = (h ^ (h >> _SHIFTS[0])) * _FACTORS[0]
        h = (h ^ (h >> _SHIFTS[1])) * _FACTORS[1]
        total += h ^ (h >> _SHIFTS[2])
    return total


def cache_folder() -> Path:
    """Where numba keeps this kernel once it is compiled, and all others of this folder."""
    return Path(str(_sum.stats.cache_path))
