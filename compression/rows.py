"""A row of values without indices: sender and receiver know which elements they belong to.

`bits` says how they travel (compression/values.py). Of m values in groups of `group_size`, a pack has

    scales   bfloat16, one per group; 0: no codes, all its values are zero      2 ceil(m / group_size) bytes
    codes    uint8, `bits` each                                                 ceil(m bits / 8) bytes

or with 32 bits one float32 tensor: 4 m bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.compression.base import Field, Packed
from thinwire.compression.bits import n_bytes, pack_bits
from thinwire.compression.errors import BadPayload
from thinwire.compression.groups import SLAB, Flat
from thinwire.compression.indices import unpack_exactly
from thinwire.compression.reduce import VALUE_LIMIT
from thinwire.compression.values import (
    FORMATS,
    Bits,
    Format,
    check_codes,
    check_scales,
    check_sendable,
    format_of,
    quantize,
)

Array = npt.NDArray[Any]
RowBits = Bits | Literal[32]

MAX_GROUP: Final = SLAB

Chunk = tuple[int, int]
"""Values [first, last) of the row: what is worked on at a time."""


class Row(Protocol):
    """m values as packed tensors, chunk by chunk: scratch does not grow with m."""

    def fields(self, m: int) -> tuple[Field, ...]: ...

    def chunks(self, m: int) -> Iterator[Chunk]: ...

    def pack(self, chunks: Iterable[Tensor]) -> Packed:
        """Float32 values of all chunks in order. Raises ValueError for values that `check` would refuse."""
        ...

    def check(self, packed: Packed, m: int) -> None:
        """Raises BadPayload unless this is what `pack` makes of m values."""
        ...

    def reader(self, packed: Packed, m: int) -> Callable[[Chunk], Tensor]:
        """Exact: float32 values of a chunk, to be read only. `packed` was checked."""
        ...

    def last_bytes(self, others: Packed, m: int) -> int:
        """How many bytes the last tensor of a pack has that begins with `others`. Raises BadPayload where
        those are not what `pack` makes."""
        ...


def row_of(bits: object, group_size: int) -> Row:
    """Raises ValueError, in words for the user."""
    # Groups begin with a byte, whatever the bits and however many groups before send nothing.
    if group_size % 8 or not 8 <= group_size <= MAX_GROUP:
        raise ValueError(f"group_size {group_size} is not a multiple of 8 in [8, {MAX_GROUP}]")
    if type(bits) is int and bits == 32:
        return Float32Row()
    try:
        return GroupedRow(format_of(bits), group_size)
    except ValueError as e:
        raise ValueError(f"bits {bits!r}: one of {', '.join(map(str, [*FORMATS, 32]))}") from e


@dataclass(frozen=True, slots=True)
class GroupedRow:
    format: Format
    group_size: int

    def fields(self, m: int) -> tuple[Field, ...]:
        n_groups = self._groups(m).n_groups
        return Field(torch.bfloat16, n_groups), Field(torch.uint8, n_bytes(m, self.format.width))

    def chunks(self, m: int) -> Iterator[Chunk]:
        """Whole groups of one length."""
        for slab in self._groups(m).slabs():
            first = slab.first * self.group_size
            yield first, first + slab.n_groups * slab.length

    def pack(self, chunks: Iterable[Tensor]) -> Packed:
        scales: list[Tensor] = [torch.empty(0, dtype=torch.bfloat16)]
        codes: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]
        for values in chunks:
            check_sendable(values)
            size = min(self.group_size, values.numel())
            scale_G, code_E = quantize(values.view(-1, size), self.format)
            scales.append(scale_G.cpu())
            codes.append(pack_bits(code_E, self.format.width))
        return torch.cat(scales), torch.cat(codes)

    def check(self, packed: Packed, m: int) -> None:
        if len(packed) != 2 or (packed[1].dtype, packed[1].dim()) != (torch.uint8, 1):
            raise BadPayload("shape", "expected scales and uint8 codes")
        scales, codes = packed
        if codes.numel() != (expected := self.last_bytes((scales,), m)):
            raise BadPayload("shape", f"{codes.numel()} bytes, {expected} for the groups with values")
        offsets = self._offsets(scales, m)
        for chunk in self.chunks(m):
            check_codes(self._codes(codes, offsets, chunk), self.format)

    def reader(self, packed: Packed, m: int) -> Callable[[Chunk], Tensor]:
        scales, codes = packed
        offsets = self._offsets(scales, m)
        scale_G = scales.float().numpy()

        def read(chunk: Chunk) -> Tensor:
            first, last = chunk
            here = slice(first // self.group_size, -(-last // self.group_size))
            length = min(self.group_size, last - first)
            live_G = scale_G[here] != 0
            values_GL = np.zeros((len(live_G), length), dtype=np.float32)
            scale_E = scale_G[here][live_G].repeat(length)
            values_E = self.format.read(self._codes(codes, offsets, chunk), scale_E)
            values_GL[live_G] = values_E.reshape(-1, length)
            return torch.from_numpy(values_GL.reshape(-1))

        return read

    def last_bytes(self, others: Packed, m: int) -> int:
        if [(t.dtype, t.dim()) for t in others] != [(torch.bfloat16, 1)]:
            raise BadPayload("shape", "expected bfloat16 scales")
        (scales,) = others
        if scales.numel() != (n_groups := self._groups(m).n_groups):
            raise BadPayload("shape", f"{scales.numel()} scales for {n_groups} groups")
        check_scales(scales, self.format)
        return n_bytes(int(self._offsets(scales, m)[-1]), self.format.width)

    def _groups(self, m: int) -> Flat:
        return Flat(m, self.group_size, k=self.group_size)

    def _offsets(self, scales: Tensor, m: int) -> Array:
        """int64 (groups + 1,): group g has the codes [offsets[g], offsets[g + 1])."""
        n_sent_G = np.full(scales.numel(), self.group_size, dtype=np.int64)
        if m % self.group_size:
            n_sent_G[-1] = m % self.group_size
        n_sent_G *= scales.view(torch.int16).numpy() != 0
        return np.concatenate([[0], n_sent_G.cumsum()])

    def _codes(self, codes: Tensor, offsets: Array, chunk: Chunk) -> Array:
        """int64: the codes of a chunk's groups. Raises BadPayload for padding bits that are set."""
        first, last = chunk
        a, b = int(offsets[first // self.group_size]), int(offsets[-(-last // self.group_size)])
        width = self.format.width
        at = a * width // 8
        return unpack_exactly(codes[at : at + n_bytes(b - a, width)], width, b - a)


@dataclass(frozen=True, slots=True)
class Float32Row:
    """The values themselves, below 2^60."""

    def fields(self, m: int) -> tuple[Field, ...]:
        return (Field(torch.float32, m),)

    def chunks(self, m: int) -> Iterator[Chunk]:
        for first in range(0, m, SLAB):
            yield first, min(first + SLAB, m)

    def pack(self, chunks: Iterable[Tensor]) -> Packed:
        values: list[Tensor] = [torch.empty(0, dtype=torch.float32)]
        for chunk in chunks:
            check_sendable(chunk)
            values.append(chunk.cpu())
        return (torch.cat(values),)

    def check(self, packed: Packed, m: int) -> None:
        if len(packed) != 1 or packed[0].dtype != torch.float32 or packed[0].shape != (m,):
            raise BadPayload("shape", f"expected {m} float32 values")
        for first, last in self.chunks(m):
            values = packed[0][first:last]
            if not bool(values.isfinite().all()):
                raise BadPayload("nan", "value")
            if not bool((values.abs() < VALUE_LIMIT).all()):
                raise BadPayload("range", "value not below 2^60")

    def reader(self, packed: Packed, m: int) -> Callable[[Chunk], Tensor]:
        return lambda chunk: packed[0][chunk[0] : chunk[1]]

    def last_bytes(self, others: Packed, m: int) -> int:
        if others:
            raise BadPayload("shape", "expected one tensor")
        return 4 * m
