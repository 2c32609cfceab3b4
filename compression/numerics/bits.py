"""Packing small integers side by side: value i takes bits [i w, (i + 1) w), low bits first."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..kernels import kernels_for, use_numba
from .bit_layout import MAX_WIDTH, n_bytes

_CHUNK: Final = 1 << 16  # values at a time, a multiple of 8: scratch of a few MB, and they begin with a byte


def pack_bits(values: Tensor, width: int) -> Tensor:
    """1-d integers in [0, 2^width), 1 <= width <= 32, to uint8; the last byte is filled up with zero bits."""
    _check_width(width)
    if kernels_for(values) == "triton":
        from ..gpu import bits_triton

        return bits_triton.pack(values, width).cpu()
    on_cpu = values.cpu()
    numbers = on_cpu.numpy().astype(np.int64, copy=False)
    if use_numba(on_cpu):
        from ..cpu import bits_cpu

        octets = np.empty(n_bytes(numbers.size, width), dtype=np.uint8)
        if not bits_cpu.pack(numbers, width, octets):
            raise ValueError(f"values do not fit into {width} bits")
        return torch.from_numpy(octets)
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << width:
        raise ValueError(f"values do not fit into {width} bits")
    out = np.empty(n_bytes(numbers.size, width), dtype=np.uint8)
    for first in range(0, numbers.size, _CHUNK):
        chunk = numbers[first : first + _CHUNK].astype("<u4").view(np.uint8).reshape(-1, 4)
        bits = np.unpackbits(chunk, axis=1, count=width, bitorder="little")
        packed = np.packbits(bits.reshape(-1), bitorder="little")
        out[first * width // 8 :][: packed.size] = packed
    return torch.from_numpy(out)


def unpack_bits(data: Tensor, width: int, n: int) -> Tensor:
    """The first `n` values of `pack_bits(values, width)`, as int64. ValueError when data is shorter."""
    _check_width(width)
    if data.numel() < n_bytes(n, width):
        raise ValueError(f"{data.numel()} bytes do not hold {n} values of {width} bits")
    if kernels_for(data) == "triton":
        from ..gpu import bits_triton

        return bits_triton.unpack(data.contiguous(), width, n).cpu()
    on_cpu = data.cpu()
    octets = on_cpu.numpy()
    out = np.empty(n, dtype=np.int64)
    if use_numba(on_cpu):
        from ..cpu import bits_cpu

        bits_cpu.unpack(octets, width, out)
        return torch.from_numpy(out)
    for first in range(0, n, _CHUNK):
        here = out[first : first + _CHUNK]
        at = first * width // 8
        _unpack(octets[at : at + n_bytes(here.size, width)], width, here)
    return torch.from_numpy(out)


def _unpack(octets: npt.NDArray[np.uint8], width: int, out: npt.NDArray[np.int64]) -> None:
    n_spanned = (width + 14) // 8  # bytes that a value can touch, whatever its first bit
    padded = np.zeros(octets.size + n_spanned, dtype=np.int64)
    padded[: octets.size] = octets
    first_bit = np.arange(out.size, dtype=np.int64) * width
    first_byte = first_bit >> 3
    word = padded[first_byte]
    for i in range(1, n_spanned):
        word |= padded[first_byte + i] << (8 * i)
    np.bitwise_and(word >> (first_bit & 7), (1 << width) - 1, out=out)


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} is not in [1, {MAX_WIDTH}]")
