"""The numba kernels of `noise`: the same bits, one pass over the parameters, near the speed of memory.

A block of 4096 elements is taken through all updates while it is in the cache. Of every probe its words are
computed (words_cpu.py), one per 32 elements for signs: a sign is a bit of its word, moved to the sign bit of
the coefficient. Signs of four probes are added up at a time, so that the sum stays in registers; it starts
with the first term, and every term is rounded once, in order, as in the reference. Gaussian terms are looked
up 64 at a time, by bytes, where the processor can (one alone is subtracted at once), or else two; words are
taken for bytes as little endian machines have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from ..compiled import compiled
from ..numerics.noise_layout import NoiseKind, Piece, Update, Where
from ..numerics.quantiles import NORMAL_256
from .addresses_cpu import aligned_words, floats_at, has_look_up, look_up, prefetch, subtract_look_up
from .threads import share
from .words_cpu import fill_some_words, fill_words, overlap

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

Word = Any
"""A numpy integer or float32 of fixed width inside a kernel."""

_TABLE: Final = np.array(NORMAL_256, dtype=np.float32)
_32: Final = np.uint64(32)
_ONE: Final = np.float32(1.0)
_HAS_LOOK_UP: Final = has_look_up()


def combine(out: Tensor, theta: Tensor, updates: Sequence[Update], where: Where) -> None:
    """out = theta after the updates, as `noise.combine_torch`. Flat contiguous float32 CPU tensors."""
    y, x, start = out.numpy(), theta.numpy(), where.start
    in_place = out.data_ptr() == theta.data_ptr()
    seeds, tails, coefficients, ends, decays = _terms(updates, where.last_word(0))
    kernel = _sign_blocks if where.kind == "sign" else _gauss_blocks
    third = np.uint32(where.param_index)

    def run(first: int, last: int) -> None:
        kernel(y, x, in_place, start, first, last, seeds, tails, coefficients, ends, decays, third, _TABLE)

    smallest = max(1, 128 // max(1, seeds.size))
    share(run, start // 4096, -(-(start + x.size) // 4096), smallest)


def combine_all(pieces: Sequence[Piece], updates: Sequence[Update], kind: NoiseKind) -> None:
    """`combine` of each in place, in one call. Flat contiguous float32 CPU tensors."""
    where = Where.of(kind, 0, 0)
    args = (
        np.array([p.theta.data_ptr() for p in pieces], dtype=np.uint64),
        np.array([p.theta.numel() for p in pieces], dtype=np.int64),
        np.array([p.start for p in pieces], dtype=np.int64),
        np.array([p.param_index for p in pieces], dtype=np.uint32),
        *_terms(updates, where.last_word(0)),
        _TABLE,
    )
    kernel = _sign_pieces if kind == "sign" else _gauss_pieces
    n_terms = max(1, int(args[4].size))
    mean = max(1, int(args[1].sum()) * n_terms // (64 * len(pieces)))
    share(lambda first, last: kernel(first, last, *args), 0, len(pieces), smallest=max(1, 4096 // mean))


@compiled
def _sign_pieces(
    first: int, last: int, addresses: Array, sizes: Array, starts: Array, thirds: Array,
    seeds: Array, tails: Array, coefficients: Array, ends: Array, decays: Array, table: Array,
) -> None:  # fmt: skip
    for p in range(first, last):
        if sizes[p] > 0:
            y, begin = floats_at(addresses[p], sizes[p]), starts[p] // 4096
            end = (starts[p] + sizes[p] + 4095) // 4096
            _sign_blocks(
                y, y, True, starts[p], begin, end, seeds, tails, coefficients, ends, decays, thirds[p], table
            )


@compiled
def _gauss_pieces(
    first: int, last: int, addresses: Array, sizes: Array, starts: Array, thirds: Array,
    seeds: Array, tails: Array, coefficients: Array, ends: Array, decays: Array, table: Array,
) -> None:  # fmt: skip
    for p in range(first, last):
        if sizes[p] > 0:
            y, begin = floats_at(addresses[p], sizes[p]), starts[p] // 4096
            end = (starts[p] + sizes[p] + 4095) // 4096
            _gauss_blocks(
                y, y, True, starts[p], begin, end, seeds, tails, coefficients, ends, decays, thirds[p], table
            )


def _terms(updates: Sequence[Update], fourth: int) -> tuple[Array, ...]:
    """Seeds, fourth words and coefficients of all probes, where those of each update end, and the decays."""
    if len(updates) == 1:  # nothing to join: of a small tensor that would take as long as its noise
        u = updates[0]
        tails = u.numbers.astype(np.uint32) + np.uint32(fourth)
        return u.seeds, tails, u.coefficients, np.array([u.seeds.size]), np.array([u.decay], dtype=np.float32)
    return (
        np.concatenate([u.seeds for u in updates]),
        np.concatenate([u.numbers for u in updates]).astype(np.uint32) + np.uint32(fourth),
        np.concatenate([u.coefficients for u in updates]),
        np.array([u.seeds.size for u in updates]).cumsum(),
        np.array([u.decay for u in updates], dtype=np.float32),
    )


# A block is taken through all updates before the next one: after the first it is in the cache.
#
# Each loop that is to become vectors is a function of its own, over slices that it is handed: counting the
# references to slices costs as much as a block. In place is another function than out of place: that two
# arrays are one the compiler sees only by its check whether they overlap, and then it makes no vectors.


@compiled
def _sign_blocks(
    y: Array, x: Array, in_place: bool, start: int, first: int, last: int,
    seeds: Array, tails: Array, coefficients: Array, ends: Array, decays: Array, third: Word, table: Array,
) -> None:  # fmt: skip
    words, acc = aligned_words(8 * 128), aligned_words(4096).view(np.float32)
    for block in range(first, last):
        a, b, skipped = overlap(x.size, start, block)
        begin = 0
        for u in range(ends.size):
            end = ends[u]
            is_written = in_place or begin > 0
            if end - begin == 1 and decays[u] == _ONE and b - a == 4096:  # a perturbation: nothing to add up
                _sign_words(words, 0, block, third, tails[begin], seeds[begin])
                if is_written:
                    _subtract_signs_in_place(y[a:b], words, coefficients[begin])
                else:
                    _subtract_signs(y[a:b], x[a:b], words, coefficients[begin])
            else:
                _add_up_signs(
                    acc, words, block, third, tails, seeds, coefficients, begin, end, y if in_place else x, b
                )
                if is_written:
                    _finish_in_place(y[a:b], acc[skipped : skipped + b - a], end - begin, decays[u])
                else:
                    _finish(y[a:b], x[a:b], acc[skipped : skipped + b - a], end - begin, decays[u])
            begin = end


@numba.njit(nogil=True)
def _subtract_signs(y: Array, x: Array, words: Array, coefficient: Word) -> None:
    """y = x - coefficient * z for a whole block."""
    plain = _bits(coefficient)
    for bit in range(32):
        up = np.uint32(31 - bit)
        for w in range(128):
            y[bit * 128 + w] = x[bit * 128 + w] - _signed(words[w], up, plain)


@numba.njit(nogil=True)
def _subtract_signs_in_place(y: Array, words: Array, coefficient: Word) -> None:
    plain = _bits(coefficient)
    for bit in range(32):
        up = np.uint32(31 - bit)
        for w in range(128):
            y[bit * 128 + w] -= _signed(words[w], up, plain)


@numba.njit(nogil=True)
def _add_up_signs(
    acc: Array, words: Array, block: int, third: Word, tails: Array, seeds: Array, coefficients: Array,
    begin: int, end: int, needed: Array, at: int,
) -> None:  # fmt: skip
    """acc = the terms of the probes [begin, end) of a whole block, in order, four at a time in registers.
    From needed[at] on a block will be needed next.

    `words` has room for eight probes: those of the next four are there before those of the last are read.
    What was written in other pieces just now would have to wait.
    """
    for p in range(begin, min(begin + 4, end)):
        _sign_words(words, (p - begin) * 128, block, third, tails[p], seeds[p])
    fours = begin + (end - begin) // 4 * 4
    for p in range(begin, fours, 4):
        half = (p - begin) % 8 * 128
        for q in range(p + 4, min(p + 8, end)):
            _sign_words(words, 512 - half + (q - p - 4) * 128, block, third, tails[q], seeds[q])
            each = 4096 // (end - begin - 4)  # little at a time: memory takes no more at once
            prefetch(needed, at + (q - begin - 4) * each, each)
        c0, c1 = _bits(coefficients[p]), _bits(coefficients[p + 1])
        c2, c3 = _bits(coefficients[p + 2]), _bits(coefficients[p + 3])
        if p == begin:
            _begin_with_four(acc, words, c0, c1, c2, c3)
        else:
            _add_four(acc, words, half, c0, c1, c2, c3)
    half = (fours - begin) % 8 * 128
    for p in range(fours, end):
        _add_one(acc, words, half + (p - fours) * 128, _bits(coefficients[p]), p == begin)


@numba.njit(nogil=True)
def _begin_with_four(acc: Array, words: Array, c0: Word, c1: Word, c2: Word, c3: Word) -> None:
    for bit in range(32):
        up = np.uint32(31 - bit)
        for w in range(128):
            value = _signed(words[w], up, c0) + _signed(words[128 + w], up, c1)
            value = value + _signed(words[256 + w], up, c2)
            acc[bit * 128 + w] = value + _signed(words[384 + w], up, c3)


@numba.njit(nogil=True)
def _add_four(acc: Array, words: Array, at: int, c0: Word, c1: Word, c2: Word, c3: Word) -> None:
    for bit in range(32):
        up = np.uint32(31 - bit)
        for w in range(128):
            i = np.uint64(at) + np.uint64(w)
            value = acc[bit * 128 + w] + _signed(words[i], up, c0)
            value = value + _signed(words[i + np.uint64(128)], up, c1)
            value = value + _signed(words[i + np.uint64(256)], up, c2)
            acc[bit * 128 + w] = value + _signed(words[i + np.uint64(384)], up, c3)


@numba.njit(nogil=True)
def _add_one(acc: Array, words: Array, at: int, coefficient: Word, is_first: bool) -> None:
    for bit in range(32):
        up = np.uint32(31 - bit)
        if is_first:
            for w in range(128):
                acc[bit * 128 + w] = _signed(words[np.uint64(at) + np.uint64(w)], up, coefficient)
        else:
            for w in range(128):
                acc[bit * 128 + w] += _signed(words[np.uint64(at) + np.uint64(w)], up, coefficient)


@numba.njit(nogil=True)
def _sign_words(words: Array, at: int, block: int, third: Word, fourth: Word, seed: Word) -> None:
    fill_words(words, at, 32, block, third, fourth, seed)


def _to_signed(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    word, up, plain = args
    sign = builder.and_(builder.shl(word, up), word.type(0x80000000))
    return builder.bitcast(builder.xor(sign, plain), context.get_value_type(signature.return_type))


def _signed_typed(typing_context: Any, word: Any, up: Any, plain: Any) -> Any:
    """float32 from its bits `plain`, its sign turned round if that bit of the word is set which `up` moves to
    the top. As numba has it, shifts are of 64 bits, and the compiler not always finds out that 32 are enough:
    half as many lanes."""
    return types.float32(types.uint32, types.uint32, types.uint32), _to_signed


_signed: Final[Any] = intrinsic(_signed_typed)


@numba.njit(inline="always")
def _bits(x: Word) -> Word:
    return np.float32(x).view(np.uint32)


@compiled
def _gauss_blocks(
    y: Array, x: Array, in_place: bool, start: int, first: int, last: int,
    seeds: Array, tails: Array, coefficients: Array, ends: Array, decays: Array, third: Word, table: Array,
) -> None:  # fmt: skip
    words, tables = aligned_words(1024), _tables(table, coefficients)
    acc, term = aligned_words(4096).view(np.float32), aligned_words(4096).view(np.float32)
    for block in range(first, last):
        a, b, skipped = overlap(x.size, start, block)
        begin = 0
        for u in range(ends.size):
            end = ends[u]
            is_written = in_place or begin > 0
            if _HAS_LOOK_UP and end - begin == 1 and decays[u] == _ONE and b - a == 4096:  # a perturbation
                _gauss_words(words, block, third, tails[begin], seeds[begin], x, a + 4096, begin == 0)
                subtract_look_up(words, tables, 1024 * begin, y, y if is_written else x, a)
                begin = end
                continue
            for p in range(begin, end):
                _gauss_words(words, block, third, tails[p], seeds[p], x, a + 4096, p == 0)
                if p == begin:
                    _look_up(acc, words, tables, p)
                else:
                    _look_up(term, words, tables, p)
                    _add(acc, term)
            if is_written:
                _finish_in_place(y[a:b], acc[skipped : skipped + b - a], end - begin, decays[u])
            else:
                _finish(y[a:b], x[a:b], acc[skipped : skipped + b - a], end - begin, decays[u])
            begin = end


@numba.njit(nogil=True)
def _gauss_words(
    words: Array, block: int, third: Word, fourth: Word, seed: Word, needed: Array, at: int, is_needed: bool
) -> None:  # fmt: skip
    """Those of a block. If `is_needed`, from needed[at] on a block will be needed next."""
    for c in range(0, 256, 16):
        if is_needed:  # a vector of calls for a few lines: memory takes no more at once
            prefetch(needed, at + 16 * c, 256)
        _some_gauss_words(words, c, block, third, fourth, seed)


@numba.njit(nogil=True)
def _some_gauss_words(words: Array, first: int, block: int, third: Word, fourth: Word, seed: Word) -> None:
    fill_some_words(words, 0, 256, first, 16, block, third, fourth, seed)


@numba.njit(nogil=True)
def _tables_of_values(table: Array, coefficients: Array) -> Array:
    """The terms of every probe, 256 each."""
    terms = np.empty(256 * coefficients.size, np.float32)
    for p in range(coefficients.size):
        for i in range(256):
            terms[256 * p + i] = table[i] * coefficients[p]
    return terms


@numba.njit(nogil=True)
def _tables_of_bytes(table: Array, coefficients: Array) -> Array:
    """The same, by bytes: the first of each, then the second, and so on."""
    octets = _tables_of_values(table, coefficients).view(np.uint8)
    planes = aligned_words(256 * coefficients.size).view(np.uint8)
    for p in range(coefficients.size):
        for i in range(256):
            for byte in range(4):
                planes[1024 * p + 256 * byte + i] = octets[1024 * p + 4 * i + byte]
    return planes


@numba.njit(nogil=True)
def _look_up_pairs(out: Array, words: Array, terms: Array, p: int) -> None:
    """The term of every byte, of the probe p; two neighbours at a time, as one number of 64 bits."""
    bits, pairs, octets = terms.view(np.uint32), out.view(np.uint64), words.view(np.uint8)
    at = np.uint64(256 * p)
    for w in range(0, 1024, 2):
        for byte in range(4):
            low, high = bits[at + octets[4 * w + byte]], bits[at + octets[4 * w + 4 + byte]]
            pairs[(byte * 1024 + w) >> 1] = np.uint64(low) | np.uint64(high) << _32


@numba.njit(nogil=True)
def _look_up_vectors(out: Array, words: Array, planes: Array, p: int) -> None:
    look_up(words, planes, 1024 * p, out)


_tables, _look_up = (
    (_tables_of_bytes, _look_up_vectors) if _HAS_LOOK_UP else (_tables_of_values, _look_up_pairs)
)


@numba.njit(nogil=True)
def _add(acc: Array, term: Array) -> None:
    for i in range(4096):
        acc[i] += term[i]


@numba.njit(nogil=True)
def _finish(y: Array, x: Array, acc: Array, n_terms: int, decay: Word) -> None:
    """y = x * decay - acc; without a term y = x * decay."""
    if n_terms == 0:
        for i in range(y.size):
            y[i] = x[i] * decay
    elif decay == _ONE:
        for i in range(y.size):
            y[i] = x[i] - acc[i]
    else:
        for i in range(y.size):
            y[i] = x[i] * decay - acc[i]


@numba.njit(nogil=True)
def _finish_in_place(y: Array, acc: Array, n_terms: int, decay: Word) -> None:
    if n_terms == 0:
        for i in range(y.size):
            y[i] *= decay
    elif decay == _ONE:
        for i in range(y.size):
            y[i] -= acc[i]
    else:
        for i in range(y.size):
            y[i] = y[i] * decay - acc[i]
