"""Packing small integers side by side: value i takes bits [i w, (i + 1) w), low bits first."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MAX_WIDTH: Final = 32
_CHUNK: Final = 1 << 16  # values at a time, a multiple of 8: scratch of a few MB, chunks end with whole bytes


def n_bytes(n: int, width: int) -> int:
    """Bytes that `n` values of `width` bits take."""
    return (n * width + 7) // 8


def pack_bits(values: Tensor, width: int) -> Tensor:
    """1-d integers in [0, 2^width), 1 <= width <= 32, to uint8; the last byte is filled up with zero bits."""
    _check_width(width)
    values = values.to(torch.int64)
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 1 << width:
        raise ValueError(f"values do not fit into {width} bits")
    pieces = [_pack(chunk, width) for chunk in torch.split(values, _CHUNK)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8, device=values.device)


def unpack_bits(data: Tensor, width: int, n: int) -> Tensor:
    """The first `n` values of `pack_bits(values, width)`, as int64. ValueError when data is shorter."""
    _check_width(width)
    if data.numel() < n_bytes(n, width):
        raise ValueError(f"{data.numel()} bytes do not hold {n} values of {width} bits")
    out = torch.empty(n, dtype=torch.int64, device=data.device)
    for first in range(0, n, _CHUNK):
        here = out[first : first + _CHUNK]
        at = first * width // 8
        _unpack(data[at : at + n_bytes(here.numel(), width)], width, here)
    return out


def _pack(values: Tensor, width: int) -> Tensor:
    bit = torch.arange(width, device=values.device)
    bits = ((values[:, None] >> bit) & 1).to(torch.uint8).view(-1)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(1, dtype=torch.uint8)


def _unpack(data: Tensor, width: int, out: Tensor) -> None:
    n_spanned = (width + 14) // 8  # bytes that a value can touch, whatever its first bit
    padded = torch.nn.functional.pad(data, (0, n_spanned)).to(torch.int64)
    first_bit = torch.arange(out.numel(), device=data.device) * width
    first_byte = first_bit >> 3
    word = padded[first_byte]
    for i in range(1, n_spanned):
        word |= padded[first_byte + i] << (8 * i)
    torch.bitwise_and(word >> (first_bit & 7), (1 << width) - 1, out=out)


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width {width} is not in [1, {MAX_WIDTH}]")
