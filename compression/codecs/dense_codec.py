"""Values without indices to bytes and back: sender and receiver know which elements they belong to.

`bits` says how they travel (numerics/values.py). Of m values in groups of `group_size`, a pack has

    scales   bfloat16, one per group; 0: no codes, all its values are zero      2 ceil(m / group_size) bytes
    codes    uint8, `bits` each                                                 ceil(m bits / 8) bytes

or with 32 bits one float32 tensor: 4 m bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base import Field, Moved, Packed
from ..errors import BadPayload
from ..kernels import kernels_on, use_numba
from ..numerics.bit_layout import n_bytes
from ..numerics.bits import pack_bits
from ..numerics.indices import unpack_exactly
from ..numerics.reduce import l1_norm
from ..numerics.value_formats import (
    FORMATS,
    VALUE_LIMIT,
    Bits,
    Format,
    Table,
    check_codes,
    check_scales,
    check_sendable,
    format_of,
)
from ..numerics.values import quantize
from .groups import SLAB, Flat

if TYPE_CHECKING:
    from ..cpu import dense_cpu

Array = npt.NDArray[Any]
DenseBits = Bits | Literal[32]

MAX_GROUP: Final = SLAB

Chunk = tuple[int, int]
"""Values [first, last) of all m: what is worked on at a time."""

_AT_ONCE: Final = 16 * SLAB
"""Values, where a kernel keeps to the cache by itself."""


class Reader(Protocol):
    """The values of a pack."""

    def __call__(self, chunk: Chunk) -> Tensor:
        """float32 values of a chunk, to be read only."""
        ...

    @property
    def grouped(self) -> dense_cpu.Grouped | None:
        """The same for kernels, where they take it."""
        ...


def mean_into(
    out: Tensor, readers: Sequence[Reader], weights: Sequence[float], inverse: float, chunk: Chunk
) -> None:
    """Exact, within `exact_arithmetic`: out = sum of weight * value, in order, times `inverse`; never -0.

    `out`: contiguous flat float32 on the CPU, as long as the chunk.
    """
    grouped = [g for read in readers if (g := read.grouped) is not None]
    if len(grouped) == len(readers):
        from ..cpu import dense_cpu

        dense_cpu.mean(out, grouped, weights, inverse, chunk[0])
        return
    out.zero_()
    for read, w in zip(readers, weights, strict=True):
        out.add_(read(chunk) * w)
    out.mul_(inverse).add_(0.0)


def l1_norms(read: Reader, chunks: Sequence[Chunk]) -> list[float]:
    """`l1_norm` of each chunk."""
    if read.grouped is None:
        return [l1_norm(read(chunk)) for chunk in chunks]
    from ..cpu import dense_cpu

    return dense_cpu.l1_norms(read.grouped, chunks)


class DenseCodec(Protocol):
    """m values as packed tensors, chunk by chunk: scratch does not grow with m."""

    def fields(self, m: int) -> tuple[Field, ...]: ...

    def chunks(self, m: int) -> Iterator[Chunk]: ...

    def long_chunks(self, m: int) -> Iterator[Chunk]:
        """Longer ones, where that is of use: a caller shall have no scratch for them."""
        ...

    def pack(self, chunks: Iterable[Tensor]) -> Packed:
        """Float32 values of all chunks in order. Raises ValueError for values that `check` would refuse."""
        ...

    def check(self, packed: Packed, m: int) -> None:
        """Raises BadPayload unless this is what `pack` makes of m values."""
        ...

    def reader(self, packed: Packed, m: int) -> Reader:
        """Exact. `packed` was checked."""
        ...

    def last_bytes(self, others: Packed, m: int) -> int:
        """How many bytes the last tensor of a pack has that begins with `others`. Raises BadPayload where
        those are not what `pack` makes."""
        ...


def dense_codec(bits: object, group_size: int) -> DenseCodec:
    """Raises ValueError, in words for the user."""
    # Groups begin with a byte, whatever the bits and however many groups before send nothing.
    if group_size % 8 or not 8 <= group_size <= MAX_GROUP:
        raise ValueError(f"group_size {group_size} is not a multiple of 8 in [8, {MAX_GROUP}]")
    if type(bits) is int and bits == 32:
        return Float32Codec()
    try:
        return GroupedCodec(format_of(bits), group_size)
    except ValueError as e:
        raise ValueError(f"bits {bits!r}: one of {', '.join(map(str, [*FORMATS, 32]))}") from e


@dataclass(frozen=True, slots=True)
class GroupedCodec:
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

    def long_chunks(self, m: int) -> Iterator[Chunk]:
        step = _AT_ONCE // self.group_size * self.group_size
        return ((first, min(first + step, m)) for first in range(0, m, step))

    def pack(self, chunks: Iterable[Tensor]) -> Packed:
        scales: list[Tensor] = [torch.empty(0, dtype=torch.bfloat16)]
        codes: list[Tensor] = [torch.empty(0, dtype=torch.uint8)]
        for values in chunks:
            if use_numba(values):
                from ..cpu import dense_cpu

                some_scales, some_codes, top = dense_cpu.pack(values, self.group_size, self.format)
                check_sendable(torch.tensor(top))
                scales.append(some_scales)
                codes.append(some_codes)
                continue
            check_sendable(values)
            size = min(self.group_size, values.numel())
            scale_G, code_E = quantize(values.view(-1, size), self.format)
            scales.append(scale_G.cpu())
            codes.append(pack_bits(code_E, self.format.width))
        return torch.cat(scales), torch.cat(codes)

    def takes_moved(self) -> bool:
        if kernels_on(torch.device("cpu")) != "numba":
            return False
        from ..cpu import dense_cpu

        return dense_cpu.has_send(self.format)

    def send_moved(self, moved: Moved, decay: float) -> Packed:
        from ..cpu import dense_cpu

        tensors = moved.leftover, moved.start, moved.end
        scales, codes, top = dense_cpu.send(*tensors, decay, self.group_size, self.format)
        check_sendable(torch.tensor(top))
        return scales, codes

    def check(self, packed: Packed, m: int) -> None:
        if len(packed) != 2 or (packed[1].dtype, packed[1].dim()) != (torch.uint8, 1):
            raise BadPayload("shape", "expected scales and uint8 codes")
        scales, codes = packed
        if codes.numel() != (expected := self.last_bytes((scales,), m)):
            raise BadPayload("shape", f"{codes.numel()} bytes, {expected} for the groups with values")
        if isinstance(self.format, Table) and use_numba(codes):
            self._check_by_kernel(codes, int(self._offsets(scales, m)[-1]))
            return
        offsets = self._offsets(scales, m)
        for chunk in self.chunks(m):
            check_codes(self._codes(codes, offsets, chunk), self.format)

    def _check_by_kernel(self, codes: Tensor, n_codes: int) -> None:
        from ..cpu import dense_cpu

        width = self.format.width
        if n_codes * width % 8:  # what stands in the last byte
            check_codes(unpack_exactly(codes[-1:], width, n_codes % (8 // width)), self.format)
        if dense_cpu.has_refused(codes, self.format):
            raise BadPayload("range", "a code without a value")

    def reader(self, packed: Packed, m: int) -> Reader:
        return _GroupedReader(self, packed, m)

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


class _GroupedReader:
    def __init__(self, codec: GroupedCodec, packed: Packed, m: int) -> None:
        scales, self._codes = packed
        self._codec, self._m = codec, m
        self._offsets = codec._offsets(scales, m)
        self._scale_G = scales.float().numpy()

    def __call__(self, chunk: Chunk) -> Tensor:
        first, last = chunk
        size = self._codec.group_size
        scale_G = self._scale_G[first // size : -(-last // size)]
        length = min(size, last - first)
        live_G = scale_G != 0
        values_GL = np.zeros((len(live_G), length), dtype=np.float32)
        code_E = self._codec._codes(self._codes, self._offsets, chunk)
        values_E = self._codec.format.read(code_E, scale_G[live_G].repeat(length))
        values_GL[live_G] = values_E.reshape(-1, length)
        return torch.from_numpy(values_GL.reshape(-1))

    @property
    def grouped(self) -> dense_cpu.Grouped | None:
        if not use_numba(self._codes):
            return None
        from ..cpu import dense_cpu

        codec = self._codec
        at_G = self._offsets[:-1] * codec.format.width // 8
        kind = dense_cpu.kind_of(codec.format)
        return dense_cpu.Grouped(self._codes.numpy(), self._scale_G, at_G, self._m, codec.group_size, kind)


@dataclass(frozen=True, slots=True)
class Float32Codec:
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

    def long_chunks(self, m: int) -> Iterator[Chunk]:
        return self.chunks(m)

    def reader(self, packed: Packed, m: int) -> Reader:
        return _PlainReader(packed[0])

    def last_bytes(self, others: Packed, m: int) -> int:
        if others:
            raise BadPayload("shape", "expected one tensor")
        return 4 * m


@dataclass(frozen=True, slots=True)
class _PlainReader:
    values: Tensor

    def __call__(self, chunk: Chunk) -> Tensor:
        return self.values[chunk[0] : chunk[1]]

    @property
    def grouped(self) -> None:
        return None
