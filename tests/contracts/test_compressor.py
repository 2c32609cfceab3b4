"""The contract of compressors: one suite, one row per implementation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thinwire.compression import wire
from thinwire.compression.base import Compressor, Packed, Part, Turn
from thinwire.compression.dct_topk import DctTopK
from thinwire.compression.dense import Dense
from thinwire.compression.errors import BadPayload
from thinwire.compression.noise import noise

ROWS: dict[str, Compressor] = {
    "dct_topk 1 bit": DctTopK(),
    "dct_topk 8 bit": DctTopK(bits=8),
    "dct_topk small groups": DctTopK(k=5, group_size=192, bits=1),
    "dct_topk all, 8 bit": DctTopK(k=128, group_size=128, bits=8),
    "dense": Dense(),
}
SHAPES = [
    *[(), (1,), (2,), (63,), (64,), (65,), (4096,), (4097,), (7919,)],
    *[(13, 17), (128, 128), (3, 5, 7), (2, 3, 5, 7), (2, 3, 4, 5, 6), (0,), (3, 0)],
]
TURN = Turn(round=7, shared_seed=8, own_seed=9, lr_factor=1.0)


@pytest.fixture(params=ROWS)
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return ROWS[request.param]


def drawn(part: Part, seed: int = 1) -> torch.Tensor:
    return noise("gauss", seed, 0, 0, 0, part.n_global)


def decoded(compressor: Compressor, packs: list[Packed], weights: list[float], part: Part) -> torch.Tensor:
    for p in packs:
        compressor.check(p, part, TURN)
    return compressor.decode(packs, weights, part, TURN)


def negative_zeros(x: torch.Tensor) -> int:
    return int(((x == 0) & torch.signbit(x)).sum())


def expected_bytes(compressor: Compressor, part: Part) -> int:
    """What the docstrings of the implementations promise for values that are not zero."""
    if isinstance(compressor, Dense):
        return 4 * part.n_global
    assert isinstance(compressor, DctTopK)
    n, size = part.n_global, compressor.group_size
    lengths = [min(size, n - first) for first in range(0, n, size)]
    n_coefficients = sum(-(-compressor.k * length // size) for length in lengths)
    return 2 * len(lengths) + -(-n_coefficients * compressor.width // 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(compressor: Compressor, shape: tuple[int, ...]) -> None:
    part = Part.whole(shape)
    x = drawn(part)
    before = x.clone()
    packed = compressor.pack(x, part, TURN)
    assert torch.equal(x, before)
    assert all(t.dim() == 1 and t.device.type == "cpu" for t in packed)
    assert sum(t.numel() * t.element_size() for t in packed) == expected_bytes(compressor, part)
    for t, field in zip(packed, compressor.fields(part), strict=True):
        assert (t.dtype, t.numel()) == (field.dtype, field.n_elements)
    y = decoded(compressor, [packed], [1.0], part)
    assert (y.dtype, y.shape) == (torch.float32, (part.n_global,))
    assert negative_zeros(y) == 0
    if part.n_global:
        assert float((x - y).norm()) < float(x.norm())


@pytest.mark.parametrize("shape", [(), (3,), (131,), (40, 50)], ids=str)
def test_what_is_left_over_is_sent_in_the_end(compressor: Compressor, shape: tuple[int, ...]) -> None:
    """The sender subtracts what was decoded: every element of every parameter gets through."""
    part = Part.whole(shape)
    x = drawn(part)
    left, received = x.clone(), torch.zeros_like(x)
    for _ in range(200):
        y = decoded(compressor, [compressor.pack(left, part, TURN)], [1.0], part)
        left -= y
        received += y
    assert torch.allclose(left + received, x, atol=1e-4)
    assert float(left.abs().max()) < 0.1 * float(x.abs().max())


def test_zeros(compressor: Compressor) -> None:
    part = Part.whole((5000,))
    packed = compressor.pack(torch.zeros(5000), part, TURN)
    y = decoded(compressor, [packed, packed], [1.0, 2.0], part)
    assert float(y.abs().max()) == 0
    assert negative_zeros(y) == 0
    assert compressor.magnitude(packed, part, TURN) == 0.0


def test_a_zero_group_among_others(compressor: Compressor) -> None:
    part = Part.whole((12_288,))
    x = drawn(part)
    x[4096:8192] = 0
    y = decoded(compressor, [compressor.pack(x, part, TURN)], [1.0], part)
    assert float(y[4096:8192].abs().max()) == 0
    assert float((x - y)[:4096].norm()) < float(x[:4096].norm())
    assert float((x - y)[8192:].norm()) < float(x[8192:].norm())


def test_the_mean(compressor: Compressor) -> None:
    part = Part.whole((10_000,))
    packs = [compressor.pack(drawn(part, seed), part, TURN) for seed in range(4)]
    alone = [decoded(compressor, [p], [1.0], part) for p in packs]
    weights = [1.0, 0.0, 2.5, 300.0]
    y = decoded(compressor, packs, weights, part)
    mean = sum(w * a.double() for w, a in zip(weights, alone, strict=True)) / sum(weights)
    assert float((y - mean).norm() / mean.norm()) < 0.01
    assert torch.equal(decoded(compressor, packs[:1], [4.0], part), alone[0])
    assert torch.equal(decoded(compressor, packs[:2], [1.0, 0.0], part), alone[0])
    assert float(decoded(compressor, packs, [0.0] * 4, part).abs().max()) == 0


def test_the_same_bits_with_any_number_of_threads(compressor: Compressor) -> None:
    part = Part.whole((500, 601))
    packs = [compressor.pack(drawn(part, seed), part, TURN) for seed in range(3)]
    before = torch.get_num_threads()
    results, magnitudes = [], []
    try:
        for n_threads in (1, 2, 2):
            torch.set_num_threads(n_threads)
            results.append(decoded(compressor, packs, [1.0, 0.3, 2.0], part))
            magnitudes.append(compressor.magnitude(packs[0], part, TURN))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r.view(torch.int32), results[0].view(torch.int32)) for r in results)
    assert len(set(magnitudes)) == 1


@pytest.mark.parametrize("n", [200, 9000, 300_000])
def test_parts_make_the_whole(compressor: Compressor, n: int) -> None:
    """Any rank decodes the part that it holds, wherever the cuts are."""
    whole = Part.whole((n,))
    packs = [compressor.pack(drawn(whole, seed), whole, TURN) for seed in range(2)]
    y = decoded(compressor, packs, [1.0, 3.0], whole)
    cuts = sorted({0, 1, n // 3, n // 2 // 64 * 64, n - 1, n})
    parts = [Part((n,), a, b) for a, b in pairwise(cuts)] + [Part((n,), 5, 5)]
    pieces = []
    for part in parts:
        own = [(p[0][part.start : part.stop],) for p in packs] if isinstance(compressor, Dense) else packs
        pieces.append(decoded(compressor, own, [1.0, 3.0], part))
    assert torch.equal(torch.cat(pieces), y)


def test_magnitude_is_the_sum_of_absolute_values(compressor: Compressor) -> None:
    part = Part.whole((9001,))
    packed = compressor.pack(drawn(part), part, TURN)
    twice = compressor.pack(drawn(part) * 2, part, TURN)
    magnitude = compressor.magnitude(packed, part, TURN)
    assert compressor.magnitude(twice, part, TURN) == 2 * magnitude
    if isinstance(compressor, Dense):
        assert magnitude == pytest.approx(float(drawn(part).double().abs().sum()), rel=1e-9)
    else:
        assert isinstance(compressor, DctTopK)
        values = torch.from_numpy(compressor._entries(packed, part).value_E)
        assert magnitude == pytest.approx(float(values.double().abs().sum()), rel=1e-9)


def test_over_the_wire(compressor: Compressor) -> None:
    parts = {f"layer.{i}": Part.whole(shape) for i, shape in enumerate(SHAPES)}
    fields = {name: compressor.fields(part) for name, part in parts.items()}
    xs = {name: drawn(part, i) for i, (name, part) in enumerate(parts.items())}
    xs["layer.6"] = torch.zeros(4096)
    payload = {name: compressor.pack(xs[name], part, TURN) for name, part in parts.items()}
    data = wire.encode(payload, fields, TURN.round, b"12345678")
    assert len(data) <= wire.max_bytes_of(fields)
    received = wire.decode(data, fields, TURN.round, b"12345678", len(data))
    for name, part in parts.items():
        sent = decoded(compressor, [payload[name]], [1.0], part)
        assert torch.equal(decoded(compressor, [received[name]], [1.0], part), sent)


def test_weights_that_make_no_mean_are_refused(compressor: Compressor) -> None:
    part = Part.whole((70,))
    packed = compressor.pack(drawn(part), part, TURN)
    for weights in ([-1.0], [float("nan")], [float("inf")], [2.0**41], [1e-30]):
        with pytest.raises(ValueError, match="weight"):
            compressor.decode([packed], weights, part, TURN)
    with pytest.raises(ValueError, match="nothing to decode"):
        compressor.decode([], [], part, TURN)


# ------------------------------------------------------------------------------------- bad payloads


def survives(compressor: Compressor, packed: Packed, part: Part) -> str | None:
    """The reason of BadPayload, or None for a payload that decodes to finite values; else the test fails."""
    try:
        compressor.check(packed, part, TURN)
    except BadPayload as e:
        return e.reason
    y = compressor.decode([packed, packed], [1.0, 3.0], part, TURN)
    assert bool(y.isfinite().all())
    assert negative_zeros(y) == 0
    assert compressor.magnitude(packed, part, TURN) >= 0
    return None


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Packed], Packed]:
    """A change of one tensor: other bytes, another length or type, a missing or an additional tensor."""
    which = draw(st.integers(0, 5))
    kind = draw(st.sampled_from(["bytes", "bytes", "bytes", "cut", "grow", "dtype", "drop", "add", "2-d"]))
    edits = draw(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6))

    def mutate(packed: Packed) -> Packed:
        tensors = [t.clone() for t in packed]
        i = which % len(tensors)
        t = tensors[i]
        if kind == "bytes" and t.numel():
            raw = t.view(torch.uint8)
            for at, value in edits:
                raw[at % raw.numel()] = value
        elif kind == "cut":
            tensors[i] = t[: edits[0][0] % (t.numel() + 1)]
        elif kind == "grow":
            tensors[i] = torch.cat([t, t[: 1 + edits[0][0] % 9]])
        elif kind == "dtype":
            tensors[i] = t.to(torch.int16)
        elif kind == "drop":
            del tensors[i]
        elif kind == "add":
            tensors.append(t)
        elif kind == "2-d":
            tensors[i] = t[None]
        return tuple(tensors)

    return mutate


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutate=mutations(), shape=st.sampled_from([(), (65,), (700,), (70, 70)]))
def test_mutated_payloads(
    compressor: Compressor, mutate: Callable[[Packed], Packed], shape: tuple[int, ...]
) -> None:
    part = Part.whole(shape)
    survives(compressor, mutate(compressor.pack(drawn(part), part, TURN)), part)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), shape=st.sampled_from([(1,), (65,), (700,)]))
def test_random_payloads(compressor: Compressor, data: st.DataObject, shape: tuple[int, ...]) -> None:
    part = Part.whole(shape)
    tensors = []
    for field in compressor.fields(part):
        n = field.n_elements * field.dtype.itemsize
        raw = data.draw(st.binary(min_size=n, max_size=n))
        tensors.append(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(field.dtype))
    survives(compressor, tuple(tensors), part)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(float("nan"), "nan"), (float("inf"), "nan"), (-float("inf"), "nan"), (2.0**60, "range")],
)
def test_values_out_of_range(compressor: Compressor, value: float, reason: str) -> None:
    part = Part.whole((5000,))
    packed = compressor.pack(drawn(part), part, TURN)
    packed[0][1 if packed[0].numel() > 1 else 0] = value
    assert survives(compressor, packed, part) == reason


CODES = [name for name, row in ROWS.items() if isinstance(row, DctTopK)]


@pytest.mark.parametrize("row", CODES)
def test_codes_that_are_refused(row: str) -> None:
    compressor = ROWS[row]
    assert isinstance(compressor, DctTopK)
    n = compressor.group_size + 70  # the second group is short: 128 coefficients
    part = Part.whole((n,))
    scales, codes = compressor.pack(drawn(part), part, TURN)
    n_codes = compressor.k + -(-compressor.k * 70 // compressor.group_size)
    number = int.from_bytes(bytes(codes.tolist()), "little")
    width, index_mask = compressor.width, 2**compressor.index_bits - 1

    def with_codes(change: Callable[[list[int]], None]) -> Packed:
        values = [number >> i * width & 2**width - 1 for i in range(n_codes)]
        change(values)
        changed = sum(v << i * width for i, v in enumerate(values))
        return scales, torch.tensor(list(changed.to_bytes(codes.numel(), "little")), dtype=torch.uint8)

    def swap(values: list[int]) -> None:
        values[0], values[1] = values[1], values[0]

    def repeat(values: list[int]) -> None:
        values[1] = values[0]

    def past_the_end(values: list[int]) -> None:
        values[-1] |= index_mask  # the largest index there is: beyond the short group

    def minus_128(values: list[int]) -> None:
        values[0] = values[0] & index_mask | 128 << compressor.index_bits

    assert survives(compressor, with_codes(lambda values: None), part) is None
    assert survives(compressor, with_codes(swap), part) == "index"
    assert survives(compressor, with_codes(repeat), part) == "index"
    if compressor.group_size > 128:
        assert survives(compressor, with_codes(past_the_end), part) == "index"
    if compressor.bits == 8:
        assert survives(compressor, with_codes(minus_128), part) == "range"
    if n_codes * width % 8:
        padded = codes.clone()
        padded[-1] |= 128
        assert survives(compressor, (scales, padded), part) == "range"
    assert survives(compressor, (-scales, codes), part) == "range"
    assert survives(compressor, (scales, codes[:-1]), part) == "shape"
    fewer = scales.clone()
    fewer[0] = 0
    assert survives(compressor, (fewer, codes), part) == "shape"


def test_bytes_of_a_model_with_one_bit_values() -> None:
    """At most 14 bits per coefficient and 200 bytes, wire format included: 28 parameters, many tiny."""
    width, layers = 128, 3
    shapes = [(256, width), (64, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width)]
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width)]
    compressor = DctTopK()
    parts = {f"p{i}": Part.whole(shape) for i, shape in enumerate(shapes)}
    fields = {name: compressor.fields(part) for name, part in parts.items()}
    n_coefficients = sum(
        -(-32 * min(4096, p.n_global - first) // 4096)
        for p in parts.values()
        for first in range(0, p.n_global, 4096)
    )
    assert len(shapes) == 28
    for zero_rows in (0, 100):  # rows of the embedding that no batch used: groups that send nothing
        xs = {name: drawn(part) for name, part in parts.items()}
        xs["p0"][: zero_rows * width] = 0
        payload = {name: compressor.pack(xs[name], part, TURN) for name, part in parts.items()}
        n_sent = n_coefficients - zero_rows * width // 4096 * 32
        data = wire.encode(payload, fields, 1, b"12345678")
        assert len(data) <= n_sent * 14 / 8 + 200
