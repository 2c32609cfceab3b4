"""The Triton kernels of `bits`: the same bytes, the same numbers.

Packing takes many rows of values in one launch, each with bytes of its own. Every byte is made by one thread
from the few values that it has a share of, so no two threads write to one byte.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics.bit_layout import n_bytes
from .tables_triton import EXACT, Array, on_device, owners, table

_BLOCK: Final = tl.constexpr(1024)
"""Bytes, or values, of a program."""


def pack(values: Tensor, width: int) -> Tensor:
    """As `bits.pack_bits`, on the device. Raises ValueError for values that do not fit: the host waits."""
    if bool(((values < 0) | (values.long() >> width != 0)).any()):
        raise ValueError(f"values do not fit into {width} bits")
    n = values.numel()
    out = torch.empty(n_bytes(n, width), dtype=torch.uint8, device=values.device)
    counts = torch.full((1,), n, dtype=torch.int64, device=values.device)
    zero = np.zeros(1, dtype=np.int64)
    pack_rows(values.contiguous(), counts, zero, zero, np.array([out.numel()]), width, out)
    return out


def pack_rows(
    values: Tensor, counts: Tensor, first_R: Array, byte_R: Array, n_bytes_R: Array, width: int, out: Tensor
) -> None:
    """Of R rows at a time: `counts[r]` (int64, on the device) values from `first_R[r]` on become bytes of
    `out` from `byte_R[r]` on, and zeros follow up to `n_bytes_R[r]` of them. No value has more than `width`
    bits: nobody looks."""
    n_programs = -(-n_bytes_R // _BLOCK.value)
    if n_programs.sum():
        rows = np.stack([first_R, byte_R, n_bytes_R, n_programs.cumsum() - n_programs], axis=1)
        device = values.device
        with on_device(values):
            _pack[(int(n_programs.sum()),)](
                values,
                out,
                counts,
                table(rows, device),
                owners(n_programs, device),
                WIDTH=width,
                AT_ONCE=(8 + 2 * width - 2) // width,
                **EXACT,
            )


def unpack(data: Tensor, width: int, n: int) -> Tensor:
    """As `bits.unpack_bits`, on the device. `data`: contiguous."""
    out = torch.empty(n, dtype=torch.int64, device=data.device)
    if n:
        with on_device(data):
            _unpack[(-(-n // _BLOCK.value),)](data, out, n, data.numel(), WIDTH=width, **EXACT)
    return out


@triton.jit
def _pack(
    values: tl.tensor, out: tl.tensor, counts: tl.tensor, rows: tl.tensor, owner: tl.tensor,
    WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    row = tl.load(owner + program).to(tl.int64)
    first, byte, n_bytes = tl.load(rows + 4 * row), tl.load(rows + 4 * row + 1), tl.load(rows + 4 * row + 2)
    n = tl.load(counts + row)
    b = (program - tl.load(rows + 4 * row + 3)) * _BLOCK + tl.arange(0, _BLOCK)
    e = 8 * b // WIDTH  # the first value that has a share of the byte
    octet = tl.zeros((_BLOCK,), tl.int64)
    for _ in tl.static_range(AT_ONCE):
        value = tl.load(values + first + e, mask=(b < n_bytes) & (e < n), other=0).to(tl.int64)
        value &= (1 << WIDTH) - 1  # as int32 a value of 32 bits may be negative
        up = e * WIDTH - 8 * b
        octet |= tl.where(up >= 0, value << tl.minimum(tl.maximum(up, 0), 8), value >> tl.maximum(-up, 0))
        e += 1
    tl.store(out + byte + b, (octet & 255).to(tl.uint8), mask=b < n_bytes)


@triton.jit
def _unpack(data: tl.tensor, out: tl.tensor, n: tl.tensor, size: tl.tensor, WIDTH: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    tl.store(out + i, bits_at(data, i * WIDTH, i < n, size, WIDTH), mask=i < n)


@triton.jit
def bits_at(
    data: tl.tensor, bit: tl.tensor, inside: tl.tensor, size: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """int64 of `WIDTH` bits, from that bit of `size` bytes on."""
    byte = bit >> 3
    word = tl.load(data + byte, mask=inside & (byte < size), other=0).to(tl.int64)
    for k in tl.static_range(1, (WIDTH + 14) // 8):  # bytes that it can touch, whatever its first bit
        more = tl.load(data + byte + k, mask=inside & (byte + k < size), other=0)
        word |= more.to(tl.int64) << (8 * k)
    return (word >> (bit & 7)) & ((1 << WIDTH) - 1)
