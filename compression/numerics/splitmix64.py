"""The mixing hash of fingerprints: the finaliser of splitmix64 (Vigna 2015), on unsigned 64-bit words.

    hash(i, bits) = mix(i * GOLDEN xor bits)
    mix(h)         for each (shift, factor) of MIX: h = (h xor h >> shift) * factor
                   then h xor h >> LAST_SHIFT

Every bit of the result depends on every bit of the word. Products wrap around.
"""

from __future__ import annotations

from typing import Final

GOLDEN: Final = 0x9E3779B97F4A7C15
MIX: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT: Final = 31
