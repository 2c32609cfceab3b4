"""What launches over many tensors share: their addresses in a table, and which program works on which.

A launch takes a table of int64, a row per tensor, and `owners`, which says of every program which tensor is
its own. Both go to the device through pinned memory, so that the host waits for nothing, and are kept:
from step to step most of them stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

EXACT: Final = {"enable_fp_fusion": False}
"""What every launch of an exact kernel says."""

Array = npt.NDArray[Any]


def on_device(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, whichever its tensors are on. On the CPU nothing is set."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def refuse_other_rows(rows: Iterable[tuple[Tensor, int]]) -> None:
    """Raises ValueError unless these are flat contiguous float32 rows of so many elements, all on one device:
    an address says nothing of that."""
    device = None
    for x, n in rows:
        device = x.device if device is None else device
        if x.dtype != torch.float32 or x.shape != (n,) or not x.is_contiguous() or x.device != device:
            raise ValueError(
                f"needs contiguous float32 rows on one device, here {n} elements on {device}, not {x.dtype} "
                f"of shape {tuple(x.shape)} with strides {x.stride()} on {x.device}"
            )


def upload(row: Tensor, device: torch.device) -> Tensor:
    """To the device, at once for the host: it does not wait."""
    return row.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else row.to(device)


class Arrival:
    """Copies of tensors on their way to the host, through pinned memory; the device goes on meanwhile."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copies: tuple[Tensor, ...] = tensors
        if tensors[0].is_cuda:
            with on_device(tensors[0]):
                self._copies = tuple(_pinned_copy(t) for t in tensors)
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        """On the CPU, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def _pinned_copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def table(rows: Array, device: torch.device) -> Tensor:
    """int64, of any shape."""
    return _kept(np.ascontiguousarray(rows, dtype=np.int64).tobytes(), device).view(rows.shape)


def owners(n_programs: Array, device: torch.device) -> Tensor:
    """int32: row i of a table n_programs[i] times."""
    return _owners(np.asarray(n_programs, dtype=np.int64).tobytes(), device)


def floats(low: Array, high: Array) -> Array:
    """int64 (n,): a float32 in the lower half and one in the upper half of each."""
    pair = np.stack([np.asarray(low, np.float32), np.asarray(high, np.float32)], axis=-1)
    found: Array = np.ascontiguousarray(pair).view(np.int64)[..., 0]
    return found


@lru_cache(maxsize=64)
def _kept(encoded: bytes, device: torch.device) -> Tensor:
    return upload(torch.from_numpy(np.frombuffer(encoded, dtype=np.int64).copy()), device)


@lru_cache(maxsize=16)
def _owners(encoded: bytes, device: torch.device) -> Tensor:
    n_programs = np.frombuffer(encoded, dtype=np.int64)
    rows = np.arange(n_programs.size, dtype=np.int32).repeat(n_programs)
    return upload(torch.from_numpy(rows), device)


@triton.jit
def pointer(address: tl.tensor, like: tl.constexpr, ALIGNED: tl.constexpr = False) -> tl.tensor:
    """Of elements of the type `like`, at an address out of a table. `ALIGNED`: it is a multiple of 16."""
    at = address.to(tl.pointer_type(like))
    if ALIGNED:
        at = tl.multiple_of(at, 16)  # here: what a call returns cannot be told anything
    return at


@triton.jit
def low_float(x: tl.tensor) -> tl.tensor:
    """The float32 in the lower half of an int64."""
    return x.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def high_float(x: tl.tensor) -> tl.tensor:
    """The float32 in the upper half of an int64."""
    return (x >> 32).to(tl.int32).to(tl.float32, bitcast=True)
