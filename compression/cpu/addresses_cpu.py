"""Memory by its address inside numba kernels: one call for many tensors, none of which needs an array.

Who passes an address keeps the tensor alive for as long as the call takes.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

_LINE: Final = 16
"""float32 of a line of the cache."""

_types: Final[Any] = types
_ir: Final[Any] = ir
_get_or_insert: Final[Any] = get_or_insert_function
_array: Final[Any] = numba.carray  # type: ignore[attr-defined]


def _to_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


def _bytes_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.uint8)(_types.uintp), _to_pointer


def _floats_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.float32)(_types.uintp), _to_pointer


def _halves_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.uint16)(_types.uintp), _to_pointer


def _to_prefetch(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    pointer, word = _ir.PointerType(_ir.IntType(8)), _ir.IntType(32)
    kind = _ir.FunctionType(_ir.VoidType(), [pointer, word, word, word])
    function = _get_or_insert(builder.module, kind, "llvm.prefetch.p0")
    # To be read, kept in all caches, data.
    builder.call(function, [builder.inttoptr(args[0], pointer), word(0), word(3), word(1)])
    return context.get_dummy_value()


def _prefetch_typed(typing_context: Any, address: Any) -> Any:
    return _types.void(_types.uintp), _to_prefetch


_prefetched: Final[Any] = intrinsic(_prefetch_typed)
_bytes_from: Final[Any] = intrinsic(_bytes_typed)
_halves_from: Final[Any] = intrinsic(_halves_typed)
_floats_from: Final[Any] = intrinsic(_floats_typed)


@numba.njit(nogil=True)
def aligned_words(n: int) -> Array:
    """uint32, n of them, any values, from the beginning of a line: numba's own arrays begin anywhere, and
    every second vector would lie in two lines."""
    room = np.empty(n + _LINE, np.uint32)
    skipped = (-room.ctypes.data % (4 * _LINE)) // 4
    return room[skipped : skipped + n]


@numba.njit(nogil=True)
def prefetch_some(x: Array, first: int, n: int) -> None:
    """As `prefetch` of x[first : first + n], as far as it goes: a slice would be counted."""
    address = np.uintp(x.ctypes.data)
    for i in range(first, min(first + n, x.size), _LINE):
        _prefetched(address + np.uintp(4 * i))


@numba.njit(nogil=True)
def prefetch(x: Array) -> None:
    """The cache will have it soon, while something else is computed: float32, a few thousand at most."""
    address = np.uintp(x.ctypes.data)
    for i in range(0, x.size, _LINE):
        _prefetched(address + np.uintp(4 * i))


@numba.njit(inline="always")
def bytes_at(address: Any, n: int) -> Array:
    """uint8, n of them. `address`: uint64, as `Tensor.data_ptr` gives it."""
    return _array(_bytes_from(np.uintp(address)), (n,))


@numba.njit(inline="always")
def halves_at(address: Any, n: int) -> Array:
    """uint16, n of them: the bits of bfloat16 values."""
    return _array(_halves_from(np.uintp(address)), (n,))


@numba.njit(inline="always")
def floats_at(address: Any, n: int) -> Array:
    """float32, n of them."""
    return _array(_floats_from(np.uintp(address)), (n,))
