"""Payloads as bytes: committed bytes, round trips, and nothing but BadPayload for everything else."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import msgpack
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compression.base import Field, Fields, Payload
from thinwire.compression.errors import BadPayload
from thinwire.compression.wire import decode, encode, layout_hash, max_bytes_of

HASH = layout_hash(b"a model and a strategy")
ROUND = 3
LIMIT = 1 << 20
DTYPES = [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int32]

SPSA: Fields = {"codes": (Field(torch.uint8, 16),)}
MIXED: Fields = {
    "b.weight": (Field(torch.bfloat16, 3), Field(torch.uint8, 10)),
    "a": (Field(torch.float32, 2), Field(torch.int8, 4), Field(torch.int32, 1), Field(torch.float16, 2)),
    "empty": (Field(torch.float32, 0),),
}
HEADER_AT = 20


def spsa_payload() -> Payload:
    return {"codes": (torch.arange(1, 17, dtype=torch.uint8),)}


def mixed_payload() -> Payload:
    return {
        "b.weight": (
            torch.tensor([1.0, -2.5], dtype=torch.bfloat16),
            torch.arange(10, dtype=torch.uint8),
        ),
        "a": (
            torch.tensor([float("nan"), -0.0]),
            torch.tensor([-128, 127, 0], dtype=torch.int8),
            torch.tensor([-(2**31)], dtype=torch.int32),
            torch.tensor([0.5, 65504.0], dtype=torch.float16),
        ),
        "empty": (torch.empty(0),),
    }


def same_bits(a: Payload, b: Payload) -> bool:
    def bits(p: Payload) -> list[tuple[object, ...]]:
        return [
            (name, t.dtype, t.shape, bytes(t.view(torch.uint8).tolist()))
            for name in sorted(p)
            for t in p[name]
        ]

    return bits(a) == bits(b)


def sealed(head_and_body: bytes) -> bytes:
    """With a checksum that fits: what a hostile sender would make."""
    return head_and_body + blake3(head_and_body).digest(8)


def with_header(data: bytes, header: bytes, body: bytes) -> bytes:
    return sealed(data[: HEADER_AT - 4] + len(header).to_bytes(4, "little") + header + body)


def reason(data: bytes, fields: Fields = SPSA, limit: int = LIMIT) -> str:
    with pytest.raises(BadPayload) as caught:
        decode(data, fields, ROUND, HASH, limit)
    return caught.value.reason


def test_committed_bytes(golden: Callable[[dict[str, str]], None]) -> None:
    """These are what other versions of this program read: they change only with a new version number."""
    golden(
        {
            "spsa": encode(spsa_payload(), SPSA, ROUND, HASH).hex(),
            "mixed": encode(mixed_payload(), MIXED, ROUND, HASH).hex(),
            "nothing": encode({}, {}, 0, bytes(8)).hex(),
        }
    )


def test_the_layout_by_hand() -> None:
    body = bytes(range(1, 17))
    expected = b"TW\x01\x00" + (3).to_bytes(4, "little") + HASH + (1).to_bytes(4, "little") + b"\x90" + body
    assert encode(spsa_payload(), SPSA, ROUND, HASH) == sealed(expected)


def test_sixteen_probes_are_short() -> None:
    assert len(encode(spsa_payload(), SPSA, ROUND, HASH)) == 45


@pytest.mark.parametrize(("payload", "fields"), [(spsa_payload(), SPSA), (mixed_payload(), MIXED), ({}, {})])
def test_round_trip(payload: Payload, fields: Fields) -> None:
    data = encode(payload, fields, ROUND, HASH)
    assert len(data) <= max_bytes_of(fields)
    received = decode(data, fields, ROUND, HASH, len(data))
    assert same_bits(received, payload)
    for tensors in received.values():
        for t in tensors:
            t.zero_()  # own and writable
    assert same_bits(decode(data, fields, ROUND, HASH, len(data)), payload)


@st.composite
def payloads(draw: st.DrawFn) -> tuple[Payload, dict[str, tuple[Field, ...]]]:
    payload: Payload = {}
    fields: dict[str, tuple[Field, ...]] = {}
    for name in draw(st.lists(st.text(max_size=5), max_size=4, unique=True)):
        tensors, expected = [], []
        for dtype in draw(st.lists(st.sampled_from(DTYPES), max_size=3)):
            n = draw(st.integers(0, 9))
            raw = draw(st.binary(min_size=n * dtype.itemsize, max_size=n * dtype.itemsize))
            tensors.append(torch.tensor(list(raw), dtype=torch.uint8).view(dtype))
            expected.append(Field(dtype, n + draw(st.sampled_from([0, 0, 1, 300]))))
        payload[name], fields[name] = tuple(tensors), tuple(expected)
    return payload, fields


@settings(max_examples=150)
@given(payloads(), st.integers(0, 2**32 - 1))
def test_any_payload_makes_the_round_trip(
    case: tuple[Payload, dict[str, tuple[Field, ...]]], its_round: int
) -> None:
    payload, fields = case
    data = encode(payload, fields, its_round, HASH)
    assert len(data) <= max_bytes_of(fields)
    assert same_bits(decode(data, fields, its_round, HASH, len(data)), payload)


@settings(max_examples=300)
@given(
    edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=5),
    cut=st.integers(0, 120),
    tail=st.binary(max_size=20),
    seal=st.booleans(),
)
def test_mutated_bytes(edits: list[tuple[int, int]], cut: int, tail: bytes, seal: bool) -> None:
    raw = bytearray(encode(mixed_payload(), MIXED, ROUND, HASH))
    for at, value in edits:
        raw[at % len(raw)] = value
    data = bytes(raw[: max(0, len(raw) - cut)]) + tail
    if seal:
        data = sealed(data[:-8])
    try:
        received = decode(data, MIXED, ROUND, HASH, LIMIT)
    except BadPayload:
        return
    assert encode(received, MIXED, ROUND, HASH) == data  # one payload has one form


@settings(max_examples=300)
@given(st.binary(max_size=100), st.booleans())
def test_random_bytes(noise: bytes, with_head: bool) -> None:
    good = encode(mixed_payload(), MIXED, ROUND, HASH)
    data = sealed(good[:16] + noise) if with_head else noise
    try:
        received = decode(data, MIXED, ROUND, HASH, LIMIT)
    except BadPayload:
        return
    assert encode(received, MIXED, ROUND, HASH) == data


@settings(max_examples=300)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(0, 9), inner, max_size=2),
        max_leaves=8,
    ),
    st.binary(max_size=40),
)
def test_any_header(value: object, body: bytes) -> None:
    data = with_header(encode(mixed_payload(), MIXED, ROUND, HASH), msgpack.packb(value), body)
    try:
        received = decode(data, MIXED, ROUND, HASH, LIMIT)
    except BadPayload:
        return
    assert encode(received, MIXED, ROUND, HASH) == data


def test_reasons() -> None:
    data = encode(spsa_payload(), SPSA, ROUND, HASH)
    assert reason(data, limit=len(data) - 1) == "oversized"
    assert reason(data + b"x") == "oversized"
    for n in range(len(data)):
        assert reason(data[:n]) == "truncated"
    assert reason(b"XX" + data[2:]) == "magic"
    assert reason(sealed(b"TW\x02" + data[3:-8])) == "version"
    assert reason(sealed(b"TW\x01\x01" + data[4:-8])) == "version"
    for at in (25, len(data) - 1):
        assert reason(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) == "checksum"
    assert reason(encode(spsa_payload(), SPSA, ROUND + 1, HASH)) == "round"
    assert reason(encode(spsa_payload(), SPSA, ROUND, bytes(8))) == "layout"
    assert reason(sealed(data[:-9])) == "truncated"
    assert reason(sealed(data[:-8] + b"x")) == "oversized"


@pytest.mark.parametrize(
    "header",
    [
        b"\xc0",  # nil
        b"\x90\x90",  # more than one value
        b"\xc1",  # not msgpack
        b"\x91",  # ends early
        b"\xdd\xff\xff\xff\xff",  # a list of four billion
        b"\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
        b"\x91" * 40,  # deep
        *map(
            msgpack.packb,
            [
                [[0, 16]],  # the usual length is not written
                [[0, 17]],
                [[0, -1]],
                [[1, 3]],
                [[-1, 3]],
                [[0, 3], [0, 3]],
                [[0]],
                [[0, 3, 3]],
                [[0, True]],
                [[False, 3]],
                [[0, 3.0]],
                [["0", 3]],
                [[0, None]],
                {0: 3},
            ],
        ),
        b"\x91\x92\x00\xcc\x03",  # not the shortest form of 3
    ],
)
def test_headers_that_are_refused(header: bytes) -> None:
    data = encode(spsa_payload(), SPSA, ROUND, HASH)
    assert reason(with_header(data, header, bytes(3))) == "header"


def test_a_shorter_tensor_is_taken() -> None:
    data = encode(spsa_payload(), SPSA, ROUND, HASH)
    received = decode(with_header(data, msgpack.packb([[0, 3]]), b"abc"), SPSA, ROUND, HASH, LIMIT)
    assert received["codes"][0].tolist() == list(b"abc")


def test_ordinals_rise() -> None:
    data = encode(mixed_payload(), MIXED, ROUND, HASH)
    body = bytes(2 * 4 + 3 + 4 + 2 * 2 + 2 * 2 + 10)
    rising, falling = [[1, 3], [4, 2]], [[4, 2], [1, 3]]
    assert decode(with_header(data, msgpack.packb(rising), body), MIXED, ROUND, HASH, LIMIT)
    assert reason(with_header(data, msgpack.packb(falling), body), MIXED) == "header"


def test_a_short_message_takes_little_memory() -> None:
    """The receiver expects 4 GB; a sender of a few bytes must not make it ask for them."""
    fields: Fields = {"x": (Field(torch.float32, 1 << 30),)}
    data = encode({"x": (torch.zeros(4),)}, fields, ROUND, HASH)
    lying = [sealed(data[:-9]), with_header(data, b"\x90", bytes(16)), data[:-1]]
    tracemalloc.start()
    try:
        for d in lying:
            assert reason(d, fields, 1 << 40) == "truncated"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_senders_mistakes() -> None:
    good = spsa_payload()
    wrong: list[Payload] = [
        {},
        {**good, "more": ()},
        {"codes": (good["codes"][0].to(torch.int8),)},
        {"codes": (torch.zeros(17, dtype=torch.uint8),)},
        {"codes": (good["codes"][0].view(4, 4),)},
        {"codes": ()},
    ]
    for payload in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 (each has its own words)
            encode(payload, SPSA, ROUND, HASH)


def test_layout_hashes() -> None:
    assert len(HASH) == 8
    assert layout_hash(b"a") != layout_hash(b"b")
