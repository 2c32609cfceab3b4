"""Numbers in fewer bytes: back to the same bits, how few they are, and bytes that nobody should trust."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compression.byte_planes import (
    MAX_BLOCK,
    BadBlock,
    max_packed_bytes,
    pack,
    unpack,
)


def weights(n: int, seed: int = 1, moved: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 0.02, n) + moved * 0.02 * np.random.default_rng(seed + 1).normal(0, 1, n)
    return values.astype(np.float32)


def bfloat16(values: np.ndarray) -> bytes:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=60)
def test_any_bytes_come_back(block: bytes, differs: bool) -> None:
    base = bytes(reversed(block)) if differs else None
    packed = pack(block, base)
    assert unpack(packed, len(block), base) == block
    assert len(packed) <= max_packed_bytes(len(block))


def test_bfloat16_weights_take_two_thirds_and_differences_a_seventh() -> None:
    before, after = bfloat16(weights(2**18)), bfloat16(weights(2**18, moved=1e-3))
    assert before != after
    assert len(pack(before)) < 0.69 * len(before)
    assert len(pack(after, before)) < 0.15 * len(after)
    assert unpack(pack(after, before), len(after), before) == after
    kept = bytearray(after)  # zipnn 0.5.4 writes into the array that it packs
    pack(kept, before)
    assert kept == after
    plain = weights(2**17).tobytes()
    assert len(pack(plain)) < 0.85 * len(plain)
    noise = np.random.default_rng(3).bytes(2**18)
    assert len(pack(noise)) <= max_packed_bytes(len(noise))


def planes(*parts: tuple[bool, bytes], width: int | None = None) -> bytes:
    data = [struct.pack(">?I", *(is_packed, len(part))) + part for is_packed, part in parts]
    return bytes([len(parts) if width is None else width]) + b"".join(data)


BOMB = zlib.compress(bytes(2**24), 9)


@pytest.mark.parametrize(
    ("packed", "n_bytes"),
    [
        (b"", 4),
        (planes((False, b"abcd"), width=3), 4),
        (planes((False, b"abcd"))[:-1], 4),
        (planes((False, b"abcd")) + b"x", 4),
        (planes((False, b"abc")), 4),
        (planes((True, b"no zlib")), 4),
        (planes((True, zlib.compress(b"abc"))), 4),
        (planes((True, zlib.compress(b"abcd")[:-2])), 4),
        (planes((True, zlib.compress(b"abcd") + b"x")), 4),
        (planes((True, BOMB)), 4),
        (planes((False, b"ac")), 4),
        (planes((False, b"")), MAX_BLOCK + 1),
    ],
)
def test_what_is_no_block_of_that_size_is_refused(packed: bytes, n_bytes: int) -> None:
    with pytest.raises(BadBlock):
        unpack(packed, n_bytes)


def test_a_bomb_takes_no_more_memory_than_was_expected() -> None:
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(BadBlock):
        unpack(planes((True, BOMB)), 1000)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
