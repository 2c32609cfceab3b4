"""The numba kernels of `noise`: the same bits, one pass over the parameters, near the speed of memory.

The kernels are compiled without numba's own threads (its default layer must not be entered by two threads at
once, and many peers of a test are threads): they release the GIL and share the blocks among a small pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.compression.quantiles import NORMAL_256

if TYPE_CHECKING:
    from thinwire.compression.noise import Probe, Where

_TABLE: Final = np.array(NORMAL_256, dtype=np.float32)
_MIN_BLOCKS_PER_THREAD: Final = 64  # below this, handing work to another thread costs more than it saves
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_32 = np.uint64(32)


def combine(out: Tensor, theta: Tensor, probes: Sequence[Probe], where: Where, decay: float) -> None:
    """out = theta * decay - acc, as `noise.combine_torch`. Flat float32 CPU tensors."""
    x, y = theta.numpy(), out.numpy()
    seeds = np.array([p.seed & (2**64 - 1) for p in probes], dtype=np.uint64)
    tail = np.array([where.last_word(p.probe) for p in probes], dtype=np.uint32)
    coefficients = np.array([p.coefficient for p in probes], dtype=np.float32)
    kernel = _sign_blocks if where.kind == "sign" else _gauss_blocks

    def run(first: int, last: int) -> None:
        kernel(
            y, x, seeds, tail, coefficients, np.uint32(where.param_index), where.start, first, last,
            np.float32(decay), _TABLE,
        )  # fmt: skip

    _share_blocks(run, where.start // 4096, -(-(where.start + x.size) // 4096))


def _share_blocks(run: Any, first: int, last: int) -> None:
    """Calls run(first, last) for block ranges, on as many threads as torch would use."""
    n = min(torch.get_num_threads(), (last - first) // _MIN_BLOCKS_PER_THREAD)
    if n <= 1:
        run(first, last)
        return
    cuts = [first + (last - first) * i // n for i in range(n + 1)]
    futures = [_pool(n - 1).submit(run, a, b) for a, b in zip(cuts[1:-1], cuts[2:], strict=True)]
    run(cuts[0], cuts[1])
    for f in futures:
        f.result()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="noise")


@numba.njit(inline="always")
def _philox(
    x0: np.uint32, x1: np.uint32, x2: np.uint32, x3: np.uint32, k0: np.uint32, k1: np.uint32
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    for _ in range(10):
        p0, p1 = np.uint64(x0) * _M0, np.uint64(x2) * _M1
        x0, x1 = np.uint32(p1 >> _32) ^ x1 ^ k0, np.uint32(p1)
        x2, x3 = np.uint32(p0 >> _32) ^ x3 ^ k1, np.uint32(p0)
        k0, k1 = np.uint32(k0 + _W0), np.uint32(k1 + _W1)
    return x0, x1, x2, x3


@numba.njit(inline="always")
def _fill_words(
    words: npt.NDArray[np.uint32],
    n_calls: int,
    block: int,
    third: np.uint32,
    fourth: np.uint32,
    seed: np.uint64,
) -> None:
    """words[l * n_calls + c] = lane l of call c of the block. `low + c` never carries: n_calls divides 2^32."""
    first = np.uint64(block) * np.uint64(n_calls)
    low, high = np.uint32(first), np.uint32(first >> _32)
    k0, k1 = np.uint32(seed), np.uint32(seed >> _32)
    for c in range(n_calls):
        a, b, d, e = _philox(np.uint32(low + np.uint32(c)), high, third, fourth, k0, k1)
        words[c] = a
        words[n_calls + c] = b
        words[2 * n_calls + c] = d
        words[3 * n_calls + c] = e


@numba.njit(inline="always")
def _finish(
    y: npt.NDArray[np.float32], x: npt.NDArray[np.float32], acc: npt.NDArray[np.float32],
    start: int, block: int, n_terms: int, decay: np.float32,
) -> None:  # fmt: skip
    """y = x * decay - acc where the block overlaps the tensor that begins at the global element `start`."""
    a = max(block * 4096 - start, 0)
    n = min((block + 1) * 4096 - start, x.size) - a
    ya, xa, skipped = y[a : a + n], x[a : a + n], a + start - block * 4096
    if n_terms == 0:
        for i in range(n):
            ya[i] = xa[i] * decay
    elif decay == np.float32(1.0):
        for i in range(n):
            ya[i] = xa[i] - acc[skipped + i]
    else:
        for i in range(n):
            ya[i] = xa[i] * decay - acc[skipped + i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _sign_blocks(y, x, seeds, tail, coefficients, third, start, first, last, decay, table):  # type: ignore[no-untyped-def]
    words = np.empty(128, np.uint32)
    acc = np.empty(4096, np.float32)
    acc_bits = acc.view(np.uint32)
    term_bits = np.empty(128, np.uint32)
    term = term_bits.view(np.float32)
    for block in range(first, last):
        for p in range(seeds.size):
            _fill_words(words, 32, block, third, tail[p], seeds[p])
            bits = coefficients[p : p + 1].view(np.uint32)[0]
            for bit in range(32):
                up = np.uint32(31 - bit)
                if p == 0:
                    for w in range(128):
                        acc_bits[bit * 128 + w] = ((words[w] << up) & np.uint32(0x80000000)) ^ bits
                else:
                    for w in range(128):
                        term_bits[w] = ((words[w] << up) & np.uint32(0x80000000)) ^ bits
                    for w in range(128):
                        acc[bit * 128 + w] += term[w]
        _finish(y, x, acc, start, block, seeds.size, decay)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _gauss_blocks(y, x, seeds, tail, coefficients, third, start, first, last, decay, table):  # type: ignore[no-untyped-def]
    words = np.empty(1024, np.uint32)
    acc = np.empty(4096, np.float32)
    for block in range(first, last):
        for p in range(seeds.size):
            _fill_words(words, 256, block, third, tail[p], seeds[p])
            coefficient = coefficients[p]
            for byte in range(4):
                down = np.uint32(8 * byte)
                for w in range(1024):
                    term = table[(words[w] >> down) & np.uint32(255)] * coefficient
                    if p == 0:
                        acc[byte * 1024 + w] = term
                    else:
                        acc[byte * 1024 + w] += term
        _finish(y, x, acc, start, block, seeds.size, decay)
