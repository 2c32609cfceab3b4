"""random_k, striding, slicing: every element within ceil(1 / rate) rounds, none twice, whatever the size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compression.base import Part, Turn
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.dense_codec import MAX_GROUP
from thinwire.compression.codecs.permutation import permuted
from thinwire.compression.codecs.random_k import RandomK
from thinwire.compression.codecs.selection import Selection
from thinwire.compression.codecs.slicing import Slicing
from thinwire.compression.codecs.striding import Striding
from thinwire.compression.errors import BadPayload
from thinwire.compression.numerics.noise import noise

KINDS = [RandomK, Striding, Slicing]
KNOWN = [803769240, 278122468, 229719992]  # committed: other versions walk the same way
every_kind = pytest.mark.parametrize("kind", KINDS)


def turn(round: int) -> Turn:
    return Turn(round=round, shared_seed=1000 + round, own_seed=2000 + round, lr_factor=1.0)


def positions(selection: Selection, n: int, round: int) -> np.ndarray:
    return selection.positions(n, turn(round), 0, selection.n_selected(n))


def rounds_of(one_in: float) -> int:
    """ceil(1 / rate)."""
    return int(np.ceil(one_in))


@every_kind
@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 3000),
    one_in=st.sampled_from([1, 1.25, 2, 3, 4, 8, 10, 49, 64, 100]),
    start=st.integers(0, 9),
)
def test_every_element_is_sent_within_a_cover(
    kind: type[Selection], n: int, one_in: float, start: int
) -> None:
    selection = kind(rate=1 / one_in)
    n_rounds = rounds_of(one_in)
    first = 1 + start * n_rounds
    if kind is RandomK:  # a walk may be shorter than that: it begins where a walk begins
        m = selection.n_selected(n)
        n_rounds = -(-n // m)
        assert n_rounds <= rounds_of(one_in)
        first = 1 + start * n_rounds
    sent = [positions(selection, n, first + i) for i in range(n_rounds)]
    for chosen in sent:
        assert len(chosen) == selection.n_selected(n) >= n / one_in * 0.999 - (kind is Striding) * n
        assert len(np.unique(chosen)) == len(chosen)
        assert 0 <= chosen.min() <= chosen.max() < n
    assert len(np.unique(np.concatenate(sent))) == n


@every_kind
@pytest.mark.parametrize("one_in", [16, 32, 64])
@pytest.mark.parametrize("shape", [(128, 64), (64, 128), (96, 32), (7, 64)])
def test_rates_that_are_powers_of_two_reach_every_row(
    kind: type[Selection], one_in: int, shape: tuple[int, int]
) -> None:
    """With decoding, as a swarm does it: a sum of all rounds has every element of a matrix exactly once."""
    part = Part.whole(shape)
    selection = kind(rate=1 / one_in, bits=32)
    x = noise("sign", 1, 0, 0, 0, part.n_global)
    total = torch.zeros(part.n_global)
    for i in range(1, one_in + 1):
        packed = selection.pack(x, part, turn(i))
        selection.check(packed, part, turn(i))
        assert packed[0].numel() == part.n_global // one_in
        total += selection.decode([packed], [1.0], part, turn(i))
    assert torch.equal(total, x)


@every_kind
def test_rate_1_sends_everything(kind: type[Selection]) -> None:
    part, n = Part.whole((37, 11)), 407
    x = noise("gauss", 2, 0, 0, 0, n)
    exact = kind(rate=1.0, bits=32)
    assert torch.equal(exact.decode([exact.pack(x, part, turn(5))], [1.0], part, turn(5)), x)
    eight = kind(rate=1.0, bits=8, group_size=512)  # one group, whatever the order
    dense = Dense(bits=8, group_size=512)
    expected = dense.decode([dense.pack(x, part, turn(5))], [1.0], part, turn(5))
    assert torch.equal(eight.decode([eight.pack(x, part, turn(5))], [1.0], part, turn(5)), expected)


@every_kind
def test_the_rounds_of_all_peers_agree_and_move_on(kind: type[Selection]) -> None:
    a, b = kind(rate=0.1), kind(rate=0.1)
    mine, theirs = turn(7), Turn(round=7, shared_seed=turn(7).shared_seed, own_seed=99, lr_factor=0.5)
    assert np.array_equal(a.positions(5000, mine, 0, 500), b.positions(5000, theirs, 0, 500))
    assert not np.intersect1d(positions(a, 5000, 7), positions(a, 5000, 8)).size
    pieces = [a.positions(5000, mine, first, first + 50) for first in range(0, 500, 50)]
    assert np.array_equal(np.concatenate(pieces), a.positions(5000, mine, 0, 500))


def test_random_walks_differ() -> None:
    first, second = RandomK(rate=0.25), RandomK(rate=0.25, seed=1)
    one, two = ([positions(first, 1000, r) for r in rounds] for rounds in (range(1, 5), range(5, 9)))
    assert not np.array_equal(np.concatenate(one), np.concatenate(two))
    assert not np.array_equal(one[0], positions(second, 1000, 1))
    overlap = np.intersect1d(one[0], two[0]).size
    assert 30 < overlap < 100  # 62 on average, as for sets that know nothing of each other


def test_known_positions() -> None:
    assert positions(Slicing(rate=0.4), 10, 3).tolist() == [8, 9, 0, 1]
    assert positions(Striding(rate=0.25), 10, 4).tolist() == [3, 7, 1]
    walk = [permuted_by_hand(i, 12, seed_of(0, 0, 12)) for i in range(12)]
    assert [positions(RandomK(rate=0.25), 12, r).tolist() for r in (1, 4)] == [walk[:3], walk[9:]]
    far = RandomK(rate=1 / 1024, seed=5).positions(10**9, turn(2), 976_560, 976_563)
    slots = [976_563 + i for i in range(976_560, 976_563)]
    assert far.tolist() == [permuted_by_hand(i, 10**9, seed_of(5, 0, 10**9)) for i in slots]
    assert far.tolist() == KNOWN


def seed_of(seed: int, walk: int, n: int) -> bytes:
    return b"thinwire random_k" + b"".join(x.to_bytes(8, "little") for x in (seed, walk, n))


def permuted_by_hand(i: int, n: int, seed: bytes) -> int:
    """One number at a time with Python's integers."""
    digest = blake3(seed).digest(32)
    key = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 32, 4)]
    n_bits = (n - 1).bit_length()
    n_low = (n_bits + 1) // 2

    def mixed(half: int, k: int) -> int:
        word = (half ^ k) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    while True:
        low, high = i % 2**n_low, i >> n_low
        for r in range(0, 8, 2):
            low ^= mixed(high, key[r]) % 2**n_low
            high ^= mixed(low, key[r + 1]) % 2 ** (n_bits - n_low)
        i = high << n_low | low
        if i < n:
            return i


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.binary(max_size=9))
def test_permutations(n: int, seed: bytes) -> None:
    image = permuted(np.arange(n, dtype=np.int64), n, seed)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permutations_look_random() -> None:
    """Neighbours end far apart: few fixed points and successions, no drift over the range."""
    n = 100_000
    image = permuted(np.arange(n, dtype=np.int64), n, b"seed")
    assert (image == np.arange(n)).sum() < 10
    assert (np.diff(image) == 1).sum() < 10
    assert abs(np.corrcoef(image, np.arange(n))[0, 1]) < 0.01
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.01
    counts = np.bincount(image[: n // 10] // 1000, minlength=100)
    assert 60 < counts.min() <= counts.max() < 140


@every_kind
def test_chunks_are_never_larger_than_a_slab(kind: type[Selection]) -> None:
    for bits, group_size in ((8, 1024), (1, 8), (16, MAX_GROUP), (32, 1024)):
        selection = kind(rate=0.5, bits=bits, group_size=group_size)
        chunks = list(selection.codec.chunks(10**6 + 7))
        assert [first for first, _ in chunks[1:]] == [last for _, last in chunks[:-1]]
        assert (chunks[0][0], chunks[-1][1]) == (0, 10**6 + 7)
        assert max(last - first for first, last in chunks) <= MAX_GROUP


@every_kind
@pytest.mark.parametrize("bits", [1, 4, 8, 16, "e3m0"])
def test_hostile_rows(kind: type[Selection], bits: Any) -> None:
    selection, part = kind(rate=0.5, bits=bits, group_size=16), Part.whole((101,))
    scales, codes = selection.pack(noise("gauss", 3, 0, 0, 0, 101), part, turn(1))

    def reason(*packed: torch.Tensor) -> str:
        with pytest.raises(BadPayload) as caught:
            selection.check(packed, part, turn(1))
        return caught.value.reason

    selection.check((scales, codes), part, turn(1))
    assert reason(scales) == reason(scales, codes, codes) == reason(codes, scales) == "shape"
    assert reason(scales[:-1], codes) == reason(scales, codes[:-1]) == "shape"
    assert reason(scales, torch.cat([codes, codes[:1]])) == "shape"
    assert reason(-scales, codes) == "range"
    assert reason(scales * float("nan"), codes) == "nan"
    without_first = scales.clone()
    without_first[0] = 0
    assert reason(without_first, codes) == "shape"
    n_first = 16 * selection.codec.format.width // 8  # type: ignore[attr-defined]
    selection.check((without_first, codes[n_first:]), part, turn(1))
    padded = codes.clone()
    if 51 * selection.codec.format.width % 8:  # type: ignore[attr-defined]
        padded[-1] |= 0x80
        assert reason(scales, padded) == "range"
    if bits != 1:
        padded[: 2 if bits == 16 else 1] = {4: 0x88, 8: 0x80, 16: 0xFF, "e3m0": 0x88}[bits]
        assert reason(scales, padded) == "range"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 0}, "rate 0"),
        ({"rate": 1.5}, "rate 1.5"),
        ({"rate": float("nan")}, "rate nan"),
        ({"rate": "1/2"}, "rate '1/2'"),
        ({"rate": True}, "rate True"),
        ({"bits": 5}, "bits 5: one of 1, 2, 4, 8, 16, e3m0, 32"),
        ({"bits": 32.0}, "bits 32.0"),
        ({"group_size": 12}, "group_size 12"),
        ({"group_size": 1 << 20}, "group_size 1048576"),
    ],
)
@every_kind
def test_refusals(kind: type[Selection], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**options)


def test_more_refusals() -> None:
    with pytest.raises(ValueError, match="seed -1"):
        RandomK(seed=-1)
    with pytest.raises(ValueError, match="bits 3"):
        Dense(bits=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole parameters only"):
        Slicing().pack(torch.zeros(5), Part((10,), 0, 5), turn(1))
    for bad in (float("nan"), float("inf"), 2.0**60):
        for bits in (8, 32):
            with pytest.raises(ValueError, match="not finite"):
                Slicing(rate=1, bits=bits).pack(torch.tensor([1.0, bad]), Part.whole((2,)), turn(1))
