"""Payloads as they lie in memory, for kernels that take all parameters of one at once.

A tensor of its own for each of many small parameters takes longer than what is done with it. A `Row` is the
payload's bytes and where each tensor begins in them; it makes tensors when it is asked for one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .base import Array, Packed, Payload

_ALIGNMENT: Final = 64


class Row(Mapping[str, Packed]):
    """A payload whose tensors lie in `data`, little endian, one after another: `lengths` of each name in
    order, of these `dtypes`, `count_T` elements each. What it gives has memory of its own."""

    def __init__(
        self,
        data: bytes,
        at: int,
        names: list[str],
        lengths: Sequence[int],
        dtypes: list[torch.dtype],
        counts: Sequence[int],
    ) -> None:
        """`at`: where the first of them begins."""
        self.data, self.names, self.dtypes = data, names, dtypes
        self._lengths, self._given = lengths, dict[str, Packed]()
        self.count_T = np.array(counts, dtype=np.int64)
        n_bytes_T = self.count_T * [dtype.itemsize for dtype in dtypes]
        self.at_T = at + np.cumsum(n_bytes_T) - n_bytes_T

    def __getitem__(self, name: str) -> Packed:
        if name not in self._given:
            self._given[name] = tuple(self._tensor(t) for t in self._numbers[name])
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _numbers(self) -> dict[str, range]:
        """Which of the tensors are a parameter's."""
        ends = [0, *accumulate(self._lengths)]
        return dict(zip(self.names, map(range, ends, ends[1:]), strict=True))

    def numbers(self, names: list[str]) -> list[int]:
        """Which of the tensors are these parameters', in order."""
        if names == self.names:
            return list(range(len(self.dtypes)))
        return [t for name in names for t in self._numbers[name]]

    def _tensor(self, t: int) -> Tensor:
        """It begins where kernels like it to."""
        dtype, n = self.dtypes[t], int(self.count_T[t])
        if n == 0:
            return torch.empty(0, dtype=dtype)
        size = n * dtype.itemsize
        memory = np.empty(size + _ALIGNMENT, dtype=np.uint8)
        begin = -memory.ctypes.data % _ALIGNMENT
        memory[begin : begin + size] = np.frombuffer(self.data, np.uint8, size, int(self.at_T[t]))
        return _of_bytes(memory[begin : begin + size], dtype)


def _of_bytes(octets: Array, dtype: torch.dtype) -> Tensor:
    """Values that were little endian, in the same memory."""
    if sys.byteorder == "big" and dtype.itemsize > 1:
        octets.view(f"u{dtype.itemsize}").byteswap(inplace=True)
    return torch.from_numpy(octets).view(dtype)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tensors of P parameters are, K of each, and how many elements they have."""

    address_PK: Array  # uint64; they begin at any byte
    count_PK: Array  # int64


def places(payload: Payload, names: list[str], dtypes: list[torch.dtype]) -> Places | None:
    """For kernels, which read bytes there, little endian, while their caller keeps the payload. None: it does
    not have one contiguous 1-d tensor of each of these types for every parameter."""
    if isinstance(payload, Row):
        numbers = payload.numbers(names)
        address = np.frombuffer(payload.data, np.uint8).ctypes.data
        address_T, count_T = (payload.at_T[numbers] + address).astype(np.uint64), payload.count_T[numbers]
        found = [payload.dtypes[t] for t in numbers]
    else:
        tensors = [t for name in names for t in payload[name]]
        if not all(t.dim() == 1 and t.is_contiguous() for t in tensors):
            return None
        address_T = np.array([t.data_ptr() for t in tensors], dtype=np.uint64)
        count_T = np.array([t.numel() for t in tensors], dtype=np.int64)
        found = [t.dtype for t in tensors]
    if found != dtypes * len(names):
        return None
    return Places(address_T.reshape(-1, len(dtypes)), count_T.reshape(-1, len(dtypes)))


def joined(payload: Payload, names: list[str], k: int, n_each: int) -> Tensor:
    """The k-th of the `n_each` tensors of each parameter, one after another: all of one type."""
    if not isinstance(payload, Row):
        return torch.cat([payload[name][k] for name in names])
    numbers = payload.numbers(names)[k::n_each]
    dtype = payload.dtypes[numbers[0]]
    n_bytes_P = payload.count_T[numbers] * dtype.itemsize
    ends_P = np.cumsum(n_bytes_P)
    at = np.repeat(payload.at_T[numbers] - ends_P + n_bytes_P, n_bytes_P) + np.arange(ends_P[-1])
    return _of_bytes(np.frombuffer(payload.data, np.uint8)[at], dtype)
