"""Memory for large tensors that live for one use, again and again.

Memory that the system hands out anew costs a page fault per 4 KiB, which takes longer than to write to it: to
fill a fresh tensor of 64 MB took ten times as long as to fill one that had been used before.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

SMALLEST: Final = 1 << 20
"""Elements. Smaller ones the C library keeps for itself."""

_ALIGNMENT: Final = 16  # elements, as torch's own allocator aligns: kernels choose their path by it

# At most one buffer that nobody uses, the largest of late. `pop` and assigning are each one step of the
# interpreter: threads, and finalizers in the middle of anything, need no lock.
_kept: Final[list[Any]] = []


def scratch(n: int) -> Tensor:
    """n float32 on the CPU, of any value. The memory is used again once the tensor and its views are gone."""
    if n < SMALLEST:
        return torch.empty(n, dtype=torch.float32)
    try:
        buffer = _kept.pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.size < n + _ALIGNMENT:
        buffer = np.empty(n + _ALIGNMENT, dtype=np.float32)
    skipped = -buffer.ctypes.data % (4 * _ALIGNMENT) // 4
    row = buffer[skipped : skipped + n]
    # torch holds on to `row` as long as there is a tensor in this memory.
    weakref.finalize(row, _give_back, buffer).atexit = False
    return torch.from_numpy(row)


def _give_back(buffer: Any) -> None:
    others = _kept[:1]
    if not others or others[0].size < buffer.size:
        _kept[:] = [buffer]
