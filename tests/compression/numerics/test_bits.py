"""Bit packing against Python's integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compression.numerics.bit_layout import n_bytes
from thinwire.compression.numerics.bits import pack_bits, unpack_bits


def packed_by_hand(values: list[int], width: int) -> bytes:
    number = int("0" + "".join(f"{v:0{width}b}" for v in reversed(values)), 2)
    return number.to_bytes(n_bytes(len(values), width), "little")


@given(
    st.integers(1, 32).flatmap(
        lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1), max_size=40))
    )
)
def test_every_width(case: tuple[int, list[int]]) -> None:
    width, values = case
    data = pack_bits(torch.tensor(values, dtype=torch.int64), width)
    assert data.dtype == torch.uint8
    assert bytes(data.tolist()) == packed_by_hand(values, width)
    assert unpack_bits(data, width, len(values)).tolist() == values


@pytest.mark.parametrize("width", [1, 3, 8, 12, 13, 17, 20, 31, 32])
def test_more_than_a_chunk(width: int, kernels: str) -> None:
    n = (1 << 16) * 2 + 5
    values = torch.arange(n, dtype=torch.int64) * 2654435761 % (1 << width)
    data = pack_bits(values, width)
    assert data.numel() == n_bytes(n, width)
    assert bytes(data.tolist()) == packed_by_hand(values.tolist(), width)
    assert torch.equal(unpack_bits(data, width, n), values)


def test_takes_bytes_and_has_a_known_order() -> None:
    assert pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(torch.tensor([0xABC, 0xDEF]), 12).tolist() == [0xBC, 0xFA, 0xDE]


def test_refusals(kernels: str) -> None:
    for width in (1, 3, 13, 32):
        for bad in (-1, 1 << width):
            with pytest.raises(ValueError, match="do not fit"):
                pack_bits(torch.tensor([0, bad, 1]), width)
    for values in (torch.tensor([16]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="4 bits"):
            pack_bits(values, 4)
    with pytest.raises(ValueError, match="1 bytes do not hold"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 3, 3)
    with pytest.raises(ValueError, match="width 33"):
        pack_bits(torch.tensor([0]), 33)
