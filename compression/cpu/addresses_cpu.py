"""Memory by its address inside numba kernels: one call for many tensors, none of which needs an array. And
instructions that the compiler does not find by itself.

Who passes an address keeps the tensor alive for as long as the call takes.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import config, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

_LINE: Final = 16
"""float32 of a line of the cache."""

_types: Final[Any] = types
_config: Final[Any] = config
_host_features: Final[Any] = get_host_cpu_features
_ir: Final[Any] = ir
_get_or_insert: Final[Any] = get_or_insert_function
_array: Final[Any] = numba.carray  # type: ignore[attr-defined]


def _to_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


def _bytes_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.uint8)(_types.uintp), _to_pointer


def _floats_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.float32)(_types.uintp), _to_pointer


def _to_prefetch(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    pointer, word = _ir.PointerType(_ir.IntType(8)), _ir.IntType(32)
    kind = _ir.FunctionType(_ir.VoidType(), [pointer, word, word, word])
    function = _get_or_insert(builder.module, kind, "llvm.prefetch.p0")
    # To be read, kept in all caches, data.
    builder.call(function, [builder.inttoptr(args[0], pointer), word(0), word(3), word(1)])
    return context.get_dummy_value()


def _prefetch_typed(typing_context: Any, address: Any) -> Any:
    return _types.void(_types.uintp), _to_prefetch


# ------------------------------------------------------------------------------- a table of 256, by bytes

_bytes: Final = ir.VectorType(ir.IntType(8), 64)
_floats: Final = ir.VectorType(ir.FloatType(), 16)
_HALVES: Final = [[4 * (i // 4) + 2 * h + i % 4 // 2 + 64 * (i % 2) for i in range(64)] for h in (0, 1)]
_WHOLES: Final = [[4 * (i // 4) + 2 * h + i % 2 + 64 * (i % 4 // 2) for i in range(64)] for h in (0, 1)]
"""From vectors with one byte of 64 values each to such with two bytes, and from those to whole values."""


def _to_look_up(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Of three addresses; with a fourth, of x: out = x - the values."""
    words, planes, out, *x = args
    number, pointer, zero = _ir.IntType(64), _ir.PointerType(_bytes), _ir.Constant(_bytes, [0] * 64)
    kind = _ir.FunctionType(_bytes, [_bytes] * 3)
    permute = _get_or_insert(builder.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")

    def place(address: Any, offset: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), pointer)

    def load(address: Any, offset: Any) -> Any:
        found = builder.load(place(address, offset))
        found.align = 4
        return found

    def mixed(a: Any, b: Any, lanes: list[int]) -> Any:
        return builder.shuffle_vector(a, b, _ir.Constant(_ir.VectorType(_ir.IntType(32), 64), lanes))

    tables = [[load(planes, number(256 * p + 64 * q)) for q in range(4)] for p in range(4)]
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    at = builder.phi(number)
    octets = load(words, at)
    is_high = builder.icmp_signed("<", octets, zero)
    found = [
        builder.select(is_high, builder.call(permute, [c, octets, d]), builder.call(permute, [a, octets, b]))
        for a, b, c, d in tables
    ]
    for half in (0, 1):
        low, high = (mixed(found[i], found[i + 1], _HALVES[half]) for i in (0, 2))
        for whole in (0, 1):
            to, value = builder.add(at, number(4096 * (2 * half + whole))), mixed(low, high, _WHOLES[whole])
            if x:
                floats = (builder.bitcast(v, _floats) for v in (load(x[0], to), value))
                value = builder.bitcast(builder.fsub(*floats), _bytes)
            builder.store(value, place(out, to)).align = 4
    further = builder.add(at, number(64))
    at.add_incoming(number(0), before)
    at.add_incoming(further, loop)
    builder.cbranch(builder.icmp_unsigned("<", further, number(4096)), loop, after)
    builder.position_at_end(after)
    return context.get_dummy_value()


def _look_up_typed(typing_context: Any, words: Any, planes: Any, out: Any) -> Any:
    return _types.void(_types.uintp, _types.uintp, _types.uintp), _to_look_up


def _subtract_typed(typing_context: Any, words: Any, planes: Any, out: Any, x: Any) -> Any:
    return _types.void(_types.uintp, _types.uintp, _types.uintp, _types.uintp), _to_look_up


_look_up: Final[Any] = intrinsic(_look_up_typed)
_subtract: Final[Any] = intrinsic(_subtract_typed)


def has_look_up() -> bool:
    """Whether kernels are compiled for a processor that has what `look_up` needs (AVX-512 VBMI)."""
    features = _config.CPU_FEATURES
    if features is None and _config.CPU_NAME is None:
        return bool(_host_features().get("avx512vbmi"))
    return "+avx512vbmi" in (features or "")


@numba.njit(nogil=True)
def look_up(words: Array, planes: Array, at: int, out: Array) -> None:
    """out[j * 1024 + w] = the value of byte j of word w: 1024 words, 4096 values. `planes`: from `at` on the
    first bytes of a table of 256 values, then the second ones, and so on."""
    address = np.uintp(planes.ctypes.data) + np.uintp(at)
    _look_up(np.uintp(words.ctypes.data), address, np.uintp(out.ctypes.data))


@numba.njit(nogil=True)
def subtract_look_up(words: Array, planes: Array, at: int, out: Array, x: Array, first: int) -> None:
    """out = x - the values, of 4096 elements from `first` on. `out` may be x. (Slices would be counted.)"""
    address, skipped = np.uintp(planes.ctypes.data) + np.uintp(at), np.uintp(4 * first)
    y, z = np.uintp(out.ctypes.data) + skipped, np.uintp(x.ctypes.data) + skipped
    _subtract(np.uintp(words.ctypes.data), address, y, z)


_prefetched: Final[Any] = intrinsic(_prefetch_typed)
_bytes_from: Final[Any] = intrinsic(_bytes_typed)
_floats_from: Final[Any] = intrinsic(_floats_typed)


@numba.njit(nogil=True)
def aligned_words(n: int) -> Array:
    """uint32, n of them, any values, from the beginning of a line: numba's own arrays begin anywhere, and
    every second vector would lie in two lines."""
    room = np.empty(n + _LINE, np.uint32)
    skipped = (-room.ctypes.data % (4 * _LINE)) // 4
    return room[skipped : skipped + n]


@numba.njit(nogil=True)
def prefetch(x: Array, first: int, n: int) -> None:
    """The cache will have x[first : first + n], as far as it goes, soon, while something else is computed:
    float32, a few thousand at most. (A slice would be counted.)"""
    address = np.uintp(x.ctypes.data)
    for i in range(first, min(first + n, x.size), _LINE):
        _prefetched(address + np.uintp(4 * i))


@numba.njit(inline="always")
def bytes_at(address: Any, n: int) -> Array:
    """uint8, n of them. `address`: uint64, as `Tensor.data_ptr` gives it."""
    return _array(_bytes_from(np.uintp(address)), (n,))


@numba.njit(inline="always")
def floats_at(address: Any, n: int) -> Array:
    """float32, n of them."""
    return _array(_floats_from(np.uintp(address)), (n,))
