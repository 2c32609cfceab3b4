"""Where an element's random bits come from, and what an update is: what the backends of `noise` share.

A call of Philox4x32 turns a key and a counter of four 32-bit words into four random ones, its lanes:

    key     = (seed low, seed high)
    counter = (call low, call high, parameter index, probe + (purpose << 20))

The flattened *global* parameter is cut into blocks of 4096 elements, and a block has calls of its own, so
that any rank on any device finds the bits of any element, whatever it computed before:

- sign: 32 calls per block, call c of block b has number 32 b + c and its lane l gives word 32 l + c of 128.
  Element e of the block takes bit e // 128 of word e % 128; a set bit means -1.
- gauss: 256 calls per block, number 256 b + c, lane l gives word 256 l + c of 1024. Element e takes byte
  e // 1024 (byte 0 is the lowest) of word e % 1024: the index into `NORMAL_256`.
- rounding to bfloat16: 512 calls per block, number 512 b + c, lane l gives word 512 l + c of 2048. Element e
  takes the low (e < 2048) or the high half of word e % 2048.
- words: call c has number c, lane l gives word 4 c + l.

Neighbours in memory take the same bit of neighbouring words: a vector unit computes many calls side by side
and writes their lanes as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

NoiseKind = Literal["sign", "gauss"]


BLOCK: Final = 4096
"""Elements per block of noise."""


MAX_PROBES: Final = 1 << 20
"""Probe numbers are below this: the purpose stands above them in the counter."""


CALLS: Final[dict[NoiseKind, int]] = {"sign": 32, "gauss": 256}
"""Philox calls per block."""


ROUND_CALLS: Final = 512
"""Philox calls per block for stochastic rounding."""

BFLOAT16_NAN: Final = 0x7FC0
"""Bits of what rounding makes of any NaN."""


class Purpose(IntEnum):
    """What random words are for: different purposes never share a counter."""

    SIGN = 0
    GAUSS = 1
    CODE = 2  # stochastic rounding of SPSA's codes
    INIT = 3  # exact initial weights
    ROUND = 4  # stochastic rounding to bfloat16
    DATA = 5  # batches


_PURPOSE: Final[dict[NoiseKind, Purpose]] = {"sign": Purpose.SIGN, "gauss": Purpose.GAUSS}


@dataclass(frozen=True, slots=True)
class Probe:
    """One term of an update: `coefficient` (a float32 value) times the noise of (seed, probe)."""

    seed: int
    probe: int
    coefficient: float


@dataclass(frozen=True, slots=True)
class Update:
    """theta = theta * decay - acc; acc = sum of coefficient * z over the probes in order.

    Every product and sum is rounded once to float32; acc starts with the first term; without a probe nothing
    is subtracted. `seeds`: uint64, `numbers` of the probes: int64, `coefficients`: float32; all (n probes,).
    """

    seeds: npt.NDArray[np.uint64]
    numbers: npt.NDArray[np.int64]
    coefficients: npt.NDArray[np.float32]
    decay: float = 1.0

    def __post_init__(self) -> None:
        for number in self.numbers[(self.numbers < 0) | (self.numbers >= MAX_PROBES)]:
            raise ValueError(f"probe {number} is not in [0, {MAX_PROBES})")

    @classmethod
    def of(cls, probes: Sequence[Probe], decay: float = 1.0) -> Update:
        return cls(
            np.array([p.seed & (1 << 64) - 1 for p in probes], dtype=np.uint64),
            np.array([p.probe for p in probes], dtype=np.int64),
            np.array([p.coefficient for p in probes], dtype=np.float32),
            decay,
        )


@dataclass(frozen=True, slots=True)
class Where:
    """The noise of which purpose, for the elements from `start` on of which parameter."""

    kind: NoiseKind
    purpose: Purpose
    param_index: int
    start: int

    @classmethod
    def of(cls, kind: NoiseKind, param_index: int, start: int) -> Where:
        return cls(kind, _PURPOSE[kind], param_index, start)

    def last_word(self, probe: int) -> int:
        """The fourth word of the counter."""
        return probe + (int(self.purpose) << 20)


@dataclass(frozen=True, slots=True)
class Piece:
    """What takes an update: elements from `start` on of a flattened parameter, contiguous, of any shape."""

    theta: Tensor
    param_index: int
    start: int
