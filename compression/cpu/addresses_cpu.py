"""Memory by its address inside numba kernels: one call for many tensors, none of which needs an array.

Who passes an address keeps the tensor alive for as long as the call takes.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

Array = Any
"""A numpy array inside a kernel; numba finds the types."""

_types: Final[Any] = types
_array: Final[Any] = numba.carray  # type: ignore[attr-defined]


def _to_pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return builder.inttoptr(args[0], context.get_value_type(signature.return_type))


def _bytes_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.uint8)(_types.uintp), _to_pointer


def _floats_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.float32)(_types.uintp), _to_pointer


def _halves_typed(typing_context: Any, address: Any) -> Any:
    return _types.CPointer(_types.uint16)(_types.uintp), _to_pointer


_bytes_from: Final[Any] = intrinsic(_bytes_typed)
_halves_from: Final[Any] = intrinsic(_halves_typed)
_floats_from: Final[Any] = intrinsic(_floats_typed)


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
