"""The numba kernels of `noise`: the same bits, one pass over the parameters, near the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numba
import numpy as np
from torch import Tensor

from thinwire.compression.quantiles import NORMAL_256
from thinwire.compression.threads import share

if TYPE_CHECKING:
    from thinwire.compression.noise import Probe, Where

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_TABLE: Final = np.array(NORMAL_256, dtype=np.float32)
_MULTIPLIERS: Final = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL: Final = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_32: Final = np.uint64(32)
_SIGN_BIT: Final = np.uint32(0x80000000)
_ONE: Final = np.float32(1.0)


def combine(out: Tensor, theta: Tensor, probes: Sequence[Probe], where: Where, decay: float) -> None:
    """out = theta * decay - acc, as `noise.combine_torch`. Flat contiguous float32 CPU tensors."""
    y, x, start = out.numpy(), theta.numpy(), where.start
    seeds = np.array([p.seed & (2**64 - 1) for p in probes], dtype=np.uint64)
    tails = np.array([where.last_word(p.probe) for p in probes], dtype=np.uint32)
    coefficients = np.array([p.coefficient for p in probes], dtype=np.float32)
    kernel = _sign_blocks if where.kind == "sign" else _gauss_blocks
    third, factor = np.uint32(where.param_index), np.float32(decay)

    def run(first: int, last: int) -> None:
        kernel(y, x, start, first, last, seeds, tails, coefficients, third, factor, _TABLE)

    share(run, start // 4096, -(-(start + x.size) // 4096), smallest=64)


@numba.njit(cache=True, nogil=True)
def _sign_blocks(
    y: Array, x: Array, start: int, first: int, last: int,
    seeds: Array, tails: Array, coefficients: Array, third: Word, decay: Word, table: Array,
) -> None:  # fmt: skip
    words = np.empty(128, np.uint32)
    acc = np.empty(4096, np.float32)
    acc_bits = acc.view(np.uint32)
    term = np.empty(128, np.float32)
    term_bits = term.view(np.uint32)
    for block in range(first, last):
        for p in range(seeds.size):
            _fill_words(words, 32, block, third, tails[p], seeds[p])
            plain = coefficients[p : p + 1].view(np.uint32)[0]
            for bit in range(32):
                up = np.uint32(31 - bit)
                if p == 0:
                    for w in range(128):
                        acc_bits[bit * 128 + w] = ((words[w] << up) & _SIGN_BIT) ^ plain
                else:
                    for w in range(128):
                        term_bits[w] = ((words[w] << up) & _SIGN_BIT) ^ plain
                    for w in range(128):
                        acc[bit * 128 + w] += term[w]
        _finish(y, x, acc, start, block, seeds.size, decay)


@numba.njit(cache=True, nogil=True)
def _gauss_blocks(
    y: Array, x: Array, start: int, first: int, last: int,
    seeds: Array, tails: Array, coefficients: Array, third: Word, decay: Word, table: Array,
) -> None:  # fmt: skip
    words = np.empty(1024, np.uint32)
    acc = np.empty(4096, np.float32)
    for block in range(first, last):
        for p in range(seeds.size):
            _fill_words(words, 256, block, third, tails[p], seeds[p])
            for byte in range(4):
                down = np.uint32(8 * byte)
                for w in range(1024):
                    term = table[(words[w] >> down) & np.uint32(255)] * coefficients[p]
                    if p == 0:
                        acc[byte * 1024 + w] = term
                    else:
                        acc[byte * 1024 + w] += term
        _finish(y, x, acc, start, block, seeds.size, decay)


@numba.njit(inline="always")
def _finish(y: Array, x: Array, acc: Array, start: int, block: int, n_terms: int, decay: Word) -> None:
    """y = x * decay - acc where the block overlaps the tensor that begins at the global element `start`."""
    a = max(block * 4096 - start, 0)
    n = min((block + 1) * 4096 - start, x.size) - a
    skipped = a + start - block * 4096
    y_here, x_here, acc_here = y[a : a + n], x[a : a + n], acc[skipped : skipped + n]
    if n_terms == 0:
        for i in range(n):
            y_here[i] = x_here[i] * decay
    elif decay == _ONE:
        for i in range(n):
            y_here[i] = x_here[i] - acc_here[i]
    else:
        for i in range(n):
            y_here[i] = x_here[i] * decay - acc_here[i]


@numba.njit(inline="always")
def _fill_words(words: Array, n_calls: int, block: int, third: Word, fourth: Word, seed: Word) -> None:
    """words[l * n_calls + c] = lane l of call c; n_calls is a power of two, so low + c never carries."""
    number = np.uint64(block) * np.uint64(n_calls)
    low, high = np.uint32(number), np.uint32(number >> _32)
    k0, k1 = np.uint32(seed), np.uint32(seed >> _32)
    for c in range(n_calls):
        a, b, d, e = _philox(np.uint32(low + np.uint32(c)), high, third, fourth, k0, k1)
        words[c] = a
        words[n_calls + c] = b
        words[2 * n_calls + c] = d
        words[3 * n_calls + c] = e


@numba.njit(inline="always")
def _philox(x0: Word, x1: Word, x2: Word, x3: Word, k0: Word, k1: Word) -> tuple[Word, Word, Word, Word]:
    for _ in range(10):
        p0, p1 = np.uint64(x0) * _MULTIPLIERS[0], np.uint64(x2) * _MULTIPLIERS[1]
        x0, x1 = np.uint32(p1 >> _32) ^ x1 ^ k0, np.uint32(p1)
        x2, x3 = np.uint32(p0 >> _32) ^ x3 ^ k1, np.uint32(p0)
        k0, k1 = np.uint32(k0 + _WEYL[0]), np.uint32(k1 + _WEYL[1])
    return x0, x1, x2, x3
