"""Memory by its address inside numba kernels: one call for many tensors, none of which needs an array.

Who passes an address keeps the tensor alive for as long as the call takes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

Array = Any
"""A numpy array inside a kernel; numba finds the types."""


@intrinsic
def _bytes_from(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.uintp), generate


@intrinsic
def _floats_from(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.uintp), generate


@numba.njit(inline="always")
def bytes_at(address: Any, n: int) -> Array:
    """uint8, n of them. `address`: uint64, as `Tensor.data_ptr` gives it."""
    return numba.carray(_bytes_from(np.uintp(address)), (n,))


@numba.njit(inline="always")
def floats_at(address: Any, n: int) -> Array:
    """float32, n of them."""
    return numba.carray(_floats_from(np.uintp(address)), (n,))
