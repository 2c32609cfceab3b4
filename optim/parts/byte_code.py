"""One byte for one SPSA scalar: sign and 7-bit logarithmic magnitude (Just One Byte, arXiv 2306.10015).

    bit 7       sign, set for negative
    bits 0..6   m: 0 means "no contribution", m in 1..127 means 2^((m - 64) / 4)

Four steps per octave, centred on 1: from 2^-15.75 to 2^15.75. 0x80 (a negative nothing) is no code.
Decoding is a table and exact; encoding is local work.
"""

from __future__ import annotations

from bisect import bisect_right
from math import isfinite
from typing import Final

NOTHING: Final = 0
NEGATIVE: Final = 0x80

_QUARTERS: Final = (1.0, 1.1892070770263672, 1.4142135381698608, 1.6817928552627563)
"""float32 values next to 2^0, 2^(1/4), 2^(1/2), 2^(3/4)."""

# Powers of two scale a float32 without rounding: these are the 127 float32 values next to 2^((m - 64) / 4).
MAGNITUDES: Final = tuple(
    _QUARTERS[m % 4] * (float(1 << m // 4) / 65536.0)  # 2^(m // 4 - 16)
    for m in range(1, 128)
)


def encode(g: float, word: int) -> int:
    """The code of `g`; NOTHING for zero, NaN and infinity.

    `word`: a uniform 32-bit word. Rounding between two steps is stochastic: within the range the expected
    decoded value is `g`; outside of it the code saturates.
    """
    if g == 0.0 or not isfinite(g):
        return NOTHING
    sign = NEGATIVE if g < 0 else 0
    size = min(max(abs(g), MAGNITUDES[0]), MAGNITUDES[-1])
    m = bisect_right(MAGNITUDES, size)  # MAGNITUDES[m - 1] <= size < MAGNITUDES[m]
    if m < len(MAGNITUDES):
        low, high = MAGNITUDES[m - 1], MAGNITUDES[m]
        m += word < (size - low) / (high - low) * 2.0**32
    return sign | m


def decode(code: int) -> float:
    """The float32 value of a code; 0.0 for NOTHING."""
    m = code & 0x7F
    if m == 0:
        return 0.0
    return -MAGNITUDES[m - 1] if code & NEGATIVE else MAGNITUDES[m - 1]
