"""Random words of `noise` inside Triton kernels."""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

_ROUNDS: Final = tl.constexpr(10)


@triton.jit
def random_words(
    block: tl.tensor, N_CALLS: tl.constexpr, third: tl.tensor, fourth: tl.tensor, seed: tl.tensor
) -> tl.tensor:
    """The four lanes of the block's calls, uint32 (N_CALLS,) each."""
    number = block.to(tl.int64) * N_CALLS
    # A power of two of calls: the low word never carries.
    low = number.to(tl.uint32) + tl.arange(0, N_CALLS).to(tl.uint32)
    high = (number >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, third.to(tl.uint32), fourth, _ROUNDS)


@triton.jit
def in_order(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Lanes (rows, calls) as one row: row by row, and of each row lane by lane."""
    pairs = tl.join(tl.join(a, b), tl.join(c, d))  # rows, calls, lower and upper bit of the lane
    return tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), (4 * a.shape[0] * a.shape[1],))
