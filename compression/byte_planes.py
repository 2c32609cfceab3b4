"""Numbers in fewer bytes on the wire, as ZipNN (arXiv 2411.05239) has it: of every number the bytes apart, so
that exponents, which are much alike, stand together and compress; where both ends have an earlier version,
only what differs from it (XOR). What does not get smaller is sent as it is.

zlib with frequencies alone (Huffman codes without matches) takes 0.67 of the bytes of normal bfloat16 values,
where zstd takes 0.68; it is on every machine, so there is nothing to agree on.

A block is `MAX_BLOCK` bytes at most. Packed: width (u8: bytes of a number), then for each of its planes, the
bytes at the same place of every number: whether it is packed (u8), length (u32), bytes. Nobody who unpacks
one allocates more than was expected, whatever the bytes say.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

MAX_BLOCK: Final = 2**20
WIDTHS: Final = (1, 2, 4)

_PLANE: Final = struct.Struct(">?I")
_SAMPLE: Final = 2**14
_LEVEL: Final = 1
_STRATEGIES: Final = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)


class BadBlock(ValueError):
    """What came is no packed block of the size that was expected."""


def max_packed_bytes(n_bytes: int) -> int:
    """No packed block of so many bytes is longer."""
    return n_bytes + 1 + max(WIDTHS) * _PLANE.size


def pack(block: bytes, base: bytes | None = None) -> bytes:
    """`base`: as long as the block, which the other end has, too."""
    data = block if base is None else _xor(block, base)
    some = _sample(data)
    return _packed(data, min(WIDTHS, key=lambda width: len(_packed(some, width))))


def unpack(packed: bytes, n_bytes: int, base: bytes | None = None) -> bytes:
    """The block, which has `n_bytes`. Raises BadBlock."""
    if not packed or packed[0] not in WIDTHS or not 0 <= n_bytes <= MAX_BLOCK:
        raise BadBlock("a packed block of no known kind")
    width, at, data = packed[0], 1, bytearray(n_bytes)
    for plane in range(width):
        if len(packed) < at + _PLANE.size:
            raise BadBlock("a packed block is cut short")
        is_packed, length = _PLANE.unpack_from(packed, at)
        at += _PLANE.size
        part, size = packed[at : at + length], len(range(plane, n_bytes, width))
        if len(part) != length:
            raise BadBlock("a packed block is cut short")
        values = _inflated(part, size) if is_packed else part
        if len(values) != size:
            raise BadBlock(f"a plane of {len(values)} bytes, not {size}")
        data[plane::width] = values
        at += length
    if at != len(packed):
        raise BadBlock("a packed block has something behind its end")
    return bytes(data) if base is None else _xor(bytes(data), base)


def _packed(data: bytes, width: int) -> bytes:
    parts = [bytes([width])]
    for plane in range(width):
        plain = data[plane::width]
        found = _compressed(plain)
        is_packed = len(found) < len(plain)
        part = found if is_packed else plain
        parts += [_PLANE.pack(is_packed, len(part)), part]
    return b"".join(parts)


def _compressed(plain: bytes) -> bytes:
    """By the strategy that suits its beginning: exponents repeat without an order, differences in runs."""
    few = plain[:_SAMPLE]
    return _deflated(plain, min(_STRATEGIES, key=lambda strategy: len(_deflated(few, strategy))))


def _deflated(plain: bytes, strategy: int) -> bytes:
    deflating = zlib.compressobj(_LEVEL, strategy=strategy)
    return deflating.compress(plain) + deflating.flush()


def _inflated(part: bytes, size: int) -> bytes:
    """Raises BadBlock; never more than `size` bytes and one."""
    inflating = zlib.decompressobj()
    try:
        found = inflating.decompress(part, size + 1)
    except zlib.error as e:
        raise BadBlock(f"a plane cannot be unpacked: {e}") from e
    if len(found) <= size and (not inflating.eof or inflating.unused_data):
        raise BadBlock("a plane does not end where it should")
    return found


def _sample(data: bytes) -> bytes:
    """From the middle; it begins at a number."""
    start = (len(data) - _SAMPLE) // 2 // max(WIDTHS) * max(WIDTHS)
    return data[start : start + _SAMPLE] if start > 0 else data


def _xor(a: bytes, b: bytes) -> bytes:
    if len(a) != len(b):
        raise BadBlock("the version that it differs from has another size")
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")
