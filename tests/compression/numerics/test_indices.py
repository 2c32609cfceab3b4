"""Codes of indices against a reader that goes bit by bit, and one form only for what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compression.errors import BadPayload
from thinwire.compression.numerics.index_layout import (
    IndexLayout,
    Most,
    PackedIndices,
    RiceIndices,
    index_layout,
    remainder_bits,
)
from thinwire.compression.numerics.indices import pack_indices, unpack_indices

Groups = list[list[tuple[int, int]]]
"""Per group (index, value)."""


def packed(layout: IndexLayout, groups: Groups, most: Most) -> tuple[bytes, np.ndarray]:
    flat = [entry for group in groups for entry in group]
    n_sent_G = np.array([len(g) for g in groups], dtype=np.int64)
    index_E, value_E = (torch.tensor([e[i] for e in flat], dtype=torch.int64) for i in (0, 1))
    codes = pack_indices(layout, index_E, value_E, n_sent_G, most)
    assert codes.dtype == torch.uint8
    return bytes(codes.tolist()), n_sent_G


def read_by_hand(data: bytes, groups: Groups, r: int, value_bits: int) -> Groups:
    """Of Rice-coded indices, from the docstring."""
    n = sum(map(len, groups))
    n_fixed = -(-n * (r + value_bits) // 8)
    fixed, unary = (int.from_bytes(part, "little") for part in (data[:n_fixed], data[n_fixed:]))
    out: Groups = []
    for group in groups:
        previous, entries = -1, []
        for _ in group:
            zeros = 0
            while not unary & 1:
                zeros, unary = zeros + 1, unary >> 1
            unary >>= 1
            code, fixed = fixed & ((1 << r + value_bits) - 1), fixed >> r + value_bits
            previous += 1 + (zeros << r | code & ((1 << r) - 1))
            entries.append((previous, code >> r))
        out.append(entries)
    assert fixed == unary == 0
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Groups, Most, int, int]:
    """Groups of n coefficients that send k or nothing; the last one may be shorter."""
    n = draw(st.integers(1, 300))
    k = draw(st.integers(1, n))
    value_bits = draw(st.sampled_from([1, 2, 4, 8, 16]))
    lengths = [n] * draw(st.integers(0, 12)) + draw(st.sampled_from([[], [-(-n // 3)]]))
    k_G = [-(-k * length // n) for length in lengths]
    groups: Groups = []
    for length, sent in zip(lengths, k_G, strict=True):
        chosen = draw(st.permutations(range(length)))[:sent] if draw(st.booleans()) else []
        groups.append([(i, draw(st.integers(0, 2**value_bits - 1))) for i in sorted(chosen)])
    most = Most(np.array(k_G, dtype=np.int64), np.array(lengths, dtype=np.int64))
    return groups, most, remainder_bits(n, k), value_bits


@settings(max_examples=80, deadline=None)
@given(cases())
def test_there_and_back(case: tuple[Groups, Most, int, int]) -> None:
    groups, most, r, value_bits = case
    flat = [entry for group in groups for entry in group]
    for layout in (RiceIndices(r, value_bits), PackedIndices(9, value_bits)):
        data, n_sent_G = packed(layout, groups, most)
        assert len(data) <= layout.max_bytes(most)
        codes = torch.tensor(list(data), dtype=torch.uint8)
        index_E, value_E = unpack_indices(layout, codes, n_sent_G, most)
        assert list(zip(index_E.tolist(), value_E.tolist(), strict=True)) == flat
        if isinstance(layout, RiceIndices):
            assert read_by_hand(data, groups, r, value_bits) == groups


@settings(max_examples=100, deadline=None)
@given(
    cases(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.integers(-3, 3)
)
def test_hostile_codes_are_refused_or_have_one_form(
    case: tuple[Groups, Most, int, int], edits: list[tuple[int, int]], grow: int
) -> None:
    groups, most, r, value_bits = case
    for layout in (RiceIndices(r, value_bits), PackedIndices(9, value_bits)):
        data, n_sent_G = packed(layout, groups, most)
        raw = bytearray(data + bytes(max(0, grow)))
        raw = raw[: max(0, len(raw) + min(0, grow))]
        for at, value in edits:
            if raw:
                raw[at % len(raw)] = value
        codes = torch.tensor(list(raw), dtype=torch.uint8)
        try:
            index_E, value_E = unpack_indices(layout, codes, n_sent_G, most)
        except BadPayload:
            continue
        again = pack_indices(layout, torch.from_numpy(index_E), torch.from_numpy(value_E), n_sent_G, most)
        assert torch.equal(again, codes)


def test_known_bytes() -> None:
    most = Most(np.array([3]), np.array([40]))
    groups: Groups = [[(0, 1), (9, 0), (39, 1)]]
    data, _ = packed(RiceIndices(3, 1), groups, most)
    # Gaps 0, 8, 29: the low bits 0, 0, 5 with values 1, 0, 1 above them; then 1, 01, 0001, one byte in all.
    assert data == bytes([0b0000_1000, 0b0000_1101, 0b0100_0101])
    assert packed(PackedIndices(6, 1), groups, most)[0] == (0 | 64 | 9 << 7 | (39 | 64) << 14).to_bytes(
        3, "little"
    )


def test_reasons() -> None:
    most = Most(np.array([3] * 100), np.array([400] * 100))
    groups: Groups = [[(1, 0), (200, 1), (390, 0)]] * 100
    layout = RiceIndices(6, 1)
    data, n_sent_G = packed(layout, groups, most)

    def reason(raw: bytes) -> str:
        with pytest.raises(BadPayload) as caught:
            unpack_indices(layout, torch.tensor(list(raw), dtype=torch.uint8), n_sent_G, most)
        return caught.value.reason

    n_fixed = -(-300 * 7 // 8)
    assert reason(b"") == "index"
    assert reason(data[: n_fixed - 1]) in ("shape", "index")
    assert reason(data[:-1]) == "index"
    assert reason(data + b"\0") == "shape"
    assert reason(data + b"\1") == "index"
    assert reason(data + bytes(1000)) == "shape"
    assert reason(data[: n_fixed - 1] + bytes([data[n_fixed - 1] | 0x80]) + data[n_fixed:]) == "range"
    assert reason(data[:n_fixed] + bytes([data[n_fixed] | 0xFF]) + data[n_fixed + 1 :]) == "index"


@pytest.mark.parametrize(
    ("n", "k", "r"), [(4096, 32, 6), (4096, 64, 5), (4096, 1, 11), (4096, 4096, 0), (1, 1, 0)]
)
def test_the_low_bits(n: int, k: int, r: int) -> None:
    assert remainder_bits(n, k) == r
    assert index_layout("rice", n, k, 1) == RiceIndices(r, 1)


def test_packed_indices_of_4096_have_12_bits() -> None:
    assert index_layout("packed", 4096, 32, 8) == PackedIndices(12, 8)
    with pytest.raises(ValueError, match="indices 'elias'"):
        index_layout("elias", 4096, 32, 8)


def test_bits_of_random_indices() -> None:
    """32 of 4096 without an order: 8.5 bits each, 0.2 above what is possible at all."""
    generator = np.random.default_rng(1)
    groups: Groups = [
        [(int(i), 0) for i in np.sort(generator.choice(4096, 32, replace=False))] for _ in range(300)
    ]
    most = Most(np.full(300, 32), np.full(300, 4096))
    data, _ = packed(index_layout("rice", 4096, 32, 1), groups, most)
    assert 8.4 < 8 * len(data) / 9600 - 1 < 8.55
