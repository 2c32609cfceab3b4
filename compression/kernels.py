"""Which kernels compute: the one place that knows the backends and decides which of them takes a tensor.

    torch     the reference, in the modules themselves: any device
    numba     compression/cpu: tensors on the CPU
    triton    compression/gpu: tensors on a CUDA device, or on the CPU through Triton's interpreter

All three give the same bits wherever something is replicated. Backends import constants and layouts, never
the modules that call them; these import a backend when `kernels_for` has named it.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Final, Literal, get_args

import torch
from torch import Tensor

Kernels = Literal["torch", "numba", "triton"]


_CHOICES: Final = ("auto", *get_args(Kernels))


def kernels_for(*tensors: Tensor) -> Kernels:
    """Which kernels take these tensors. THINWIRE_KERNELS: auto (default), torch, numba or triton.

    `numba` and `triton` insist: they fail where they are missing. Tensors that are not on a device of theirs
    always take the torch path. Triton's interpreter (TRITON_INTERPRET=1) makes the CPU a device of its own.
    """
    choice = os.environ.get("THINWIRE_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"THINWIRE_KERNELS={choice!r}: {', '.join(_CHOICES)}")
    devices = {t.device.type for t in tensors}
    if devices == {"cpu"}:
        if choice == "numba" or (choice == "auto" and is_installed("numba")):
            return "numba"
        if choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return "triton"
    elif devices == {"cuda"} and (choice == "triton" or (choice == "auto" and is_installed("triton"))):
        return "triton"
    return "torch"


def use_numba(*tensors: Tensor) -> bool:
    """Whether the numba kernels take these tensors."""
    return kernels_for(*tensors) == "numba"


def kernels_on(device: torch.device) -> Kernels:
    """`kernels_for` a tensor that will be there."""
    return kernels_for(torch.empty(0, device=device))


@cache
def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported for the answer."""
    return find_spec(package) is not None
