"""The contract of compressors: one suite, one row per implementation."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.formulas import has_expected_bytes, name_of, small_compressors, value_bits
from tests.support.paths import ROOT
from thinwire.compression import wire
from thinwire.compression.base import Compressor, Packed, Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.none import Nothing
from thinwire.compression.codecs.random_k import RandomK
from thinwire.compression.codecs.selection import Selection
from thinwire.compression.codecs.slicing import Slicing
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.striding import Striding
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import BadPayload, ConfigError
from thinwire.compression.numerics.noise import noise
from thinwire.optim.registry import build_compressor

ROWS: dict[str, Compressor] = {
    "dct_topk 1 bit": DctTopK(),
    "dct_topk 8 bit": DctTopK(bits=8),
    "dct_topk small groups": DctTopK(k=5, group_size=192, bits=1),
    "dct_topk all, 8 bit": DctTopK(k=128, group_size=128, bits=8),
    "dct_topk rice, 1 bit": DctTopK(indices="rice"),
    "dct_topk rice, odd groups, 2 bit": DctTopK(k=7, group_size=100, bits=2, indices="rice"),
    "dct_topk tiles, 4 bit": DctTopK(layout="tiles", bits=4),
    "dct_topk small tiles, rice, fp16": DctTopK(k=3, group_size=64, bits=16, indices="rice", layout="tiles"),
    "topk 1 bit": TopK(),
    "topk 2 bit": TopK(k=64, bits=2),
    "topk packed, e3m0": TopK(k=5, group_size=100, bits="e3m0", indices="packed"),
    "topk all, fp16": TopK(k=64, group_size=64, bits=16),
    "random_k 1 bit": RandomK(rate=0.25, bits=1),
    "random_k 8 bit": RandomK(rate=0.3, group_size=64),
    "striding 2 bit": Striding(rate=0.25, bits=2),
    "striding fp16": Striding(rate=0.1, bits=16, group_size=8),
    "slicing 4 bit": Slicing(rate=0.25, bits=4),
    "slicing 32 bit": Slicing(rate=0.1, bits=32),
    "dense": Dense(),
    "dense 1 bit": Dense(bits=1),
    "dense e3m0": Dense(bits="e3m0", group_size=64),
    "dense 4 bit, zstd": Dense(bits=4, group_size=64, zstd=True),
}
LOCAL_GROUPS = [
    name for name, row in ROWS.items() if isinstance(row, Sparse | Dense) and 4096 % row.group_size == 0
]
PAYLOADS = ROOT / "tests/golden/compressor_payloads.json"
SHAPES = [
    *[(), (1,), (2,), (63,), (64,), (65,), (4096,), (4097,), (7919,)],
    *[(13, 17), (128, 128), (130, 67), (64, 4200), (3, 5, 7), (2, 3, 5, 7), (2, 3, 4, 5, 6)],
    *[(0,), (3, 0)],
]


def turn(round: int) -> Turn:
    return Turn(round=round, shared_seed=8, own_seed=9, lr_factor=1.0)


TURN = turn(7)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ROWS)
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return ROWS[request.param]


def drawn(part: Part, seed: int = 1) -> torch.Tensor:
    return noise("gauss", seed, 0, 0, 0, part.n_global)


def decoded(
    compressor: Compressor, packs: list[Packed], weights: list[float], part: Part, its_turn: Turn = TURN
) -> torch.Tensor:
    for p in packs:
        compressor.check(p, part, its_turn)
    return compressor.decode(packs, weights, part, its_turn)


def negative_zeros(x: torch.Tensor) -> int:
    return int(((x == 0) & torch.signbit(x)).sum())


def is_short(compressor: Compressor) -> bool:
    """Whether the number of bytes depends on the values."""
    if isinstance(compressor, Dense):
        return compressor.zstd
    return isinstance(compressor, Sparse) and compressor.indices == "rice"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(compressor: Compressor, shape: tuple[int, ...]) -> None:
    part = Part.whole(shape)
    x = drawn(part)
    before = x.clone()
    packed = compressor.pack(x, part, TURN)
    assert torch.equal(x, before)
    assert all(t.dim() == 1 and t.device.type == "cpu" for t in packed)
    assert has_expected_bytes(compressor, packed, part)
    for t, field in zip(packed, compressor.fields(part), strict=True):
        assert t.dtype == field.dtype
        assert t.numel() <= field.n_elements if is_short(compressor) else t.numel() == field.n_elements
    y = decoded(compressor, [packed], [1.0], part)
    assert (y.dtype, y.shape) == (torch.float32, (part.n_global,))
    assert negative_zeros(y) == 0
    if part.n_global:
        assert float((x - y).norm()) < float(x.norm())


ODD = [
    (),
    (1,),
    (2,),
    (7,),
    (61,),
    (521,),
    (31, 37),
    (5, 7, 11),
    (3, 5, 7, 11),
    (2, 3, 5, 7, 11),
    (3, 1, 1, 97, 2),
]


@pytest.mark.parametrize("config", small_compressors(), ids=name_of)
def test_bytes_of_every_compressor_and_width(config: dict[str, Any]) -> None:
    """Prime sizes and small ones in 0 to 5 dimensions, over rounds that select other elements."""
    compressor = build_compressor(config)
    for i, shape in enumerate(ODD):
        part, its_turn = Part.whole(shape), turn(1 + i)
        x = drawn(part, i)
        packed = compressor.pack(x, part, its_turn)
        assert has_expected_bytes(compressor, packed, part), shape
        y = decoded(compressor, [packed], [1.0], part, its_turn)
        assert float((x - y).norm()) < float(x.norm()), shape


@pytest.mark.parametrize("shape", [(), (3,), (131,), (40, 50)], ids=str)
def test_what_is_left_over_is_sent_in_the_end(compressor: Compressor, shape: tuple[int, ...]) -> None:
    """The sender subtracts what was decoded: every element of every parameter gets through."""
    part = Part.whole(shape)
    x = drawn(part)
    left, received = x.clone(), torch.zeros_like(x)
    rate = compressor.rate if isinstance(compressor, Selection) else 1.0
    for i in range(1, int(200 / rate) + 1):
        y = decoded(compressor, [compressor.pack(left, part, turn(i))], [1.0], part, turn(i))
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


@pytest.mark.parametrize("row", LOCAL_GROUPS)
def test_a_zero_group_among_others(row: str) -> None:
    compressor, part = ROWS[row], Part.whole((12_288,))
    x = drawn(part)
    x[4096:8192] = 0
    y = decoded(compressor, [compressor.pack(x, part, TURN)], [1.0], part)
    assert float(y[4096:8192].abs().max()) == 0
    assert float((x - y)[:4096].norm()) < float(x[:4096].norm())
    assert float((x - y)[8192:].norm()) < float(x[8192:].norm())


def test_the_mean(compressor: Compressor) -> None:
    part = Part.whole((100, 100))
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


@pytest.mark.parametrize("shape", [(200,), (90, 100), (500, 601), (128, 4096)], ids=str)
def test_parts_make_the_whole(compressor: Compressor, shape: tuple[int, ...]) -> None:
    """Any rank decodes the part that it holds, wherever the cuts are."""
    whole = Part.whole(shape)
    n = whole.n_global
    packs = [compressor.pack(drawn(whole, seed), whole, TURN) for seed in range(2)]
    y = decoded(compressor, packs, [1.0, 3.0], whole)
    cuts = sorted({0, 1, n // 3, n // 2 // 64 * 64, n - 1, n})
    parts = [Part(shape, a, b) for a, b in pairwise(cuts)] + [Part(shape, 5, 5)]
    pieces = [decoded(compressor, packs, [1.0, 3.0], part) for part in parts]
    assert torch.equal(torch.cat(pieces), y)


def test_magnitude_is_the_sum_of_absolute_values(compressor: Compressor) -> None:
    part = Part.whole((9001,))
    packed = compressor.pack(drawn(part), part, TURN)
    twice = compressor.pack(drawn(part) * 2, part, TURN)
    magnitude = compressor.magnitude(packed, part, TURN)
    assert compressor.magnitude(twice, part, TURN) == 2 * magnitude
    if isinstance(compressor, Sparse):
        values = torch.from_numpy(compressor.entries(packed, part).value_E)
    else:
        values = decoded(compressor, [packed], [1.0], part)
    assert magnitude == pytest.approx(float(values.double().abs().sum()), rel=1e-9)


def test_over_the_wire(compressor: Compressor) -> None:
    parts = {f"layer.{i}": Part.whole(shape) for i, shape in enumerate(SHAPES)}
    fields = {name: compressor.fields(part) for name, part in parts.items()}
    xs = {name: drawn(part, i) for i, (name, part) in enumerate(parts.items())}
    xs["layer.6"] = torch.zeros(4096)
    xs["layer.10"].view(128, 128)[:, :64] = 0
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutate=mutations(), shape=st.sampled_from([(), (65,), (700,), (70, 70)]))
def test_mutated_payloads(
    compressor: Compressor, mutate: Callable[[Packed], Packed], shape: tuple[int, ...]
) -> None:
    part = Part.whole(shape)
    survives(compressor, mutate(compressor.pack(drawn(part), part, TURN)), part)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# ------------------------------------------------------------------------------- scratch, golden bytes


def test_scratch_does_not_grow_with_the_parameter(compressor: Compressor) -> None:
    """That of numpy: a few MB, and 60 bytes per coefficient that has an index."""
    part = Part.whole((500, 4000))
    packed = compressor.pack(drawn(part), part, TURN)
    n_entries = part.n_global * compressor.k // compressor.group_size if isinstance(compressor, Sparse) else 0
    compressor.fields(part)
    tracemalloc.start()
    try:
        compressor.check(packed, part, TURN)
        compressor.decode([packed], [1.0], part, TURN)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * n_entries + (12 << 20)


GOLDEN = [name for name, row in ROWS.items() if value_bits(row) < 16]


def golden_packs(row: str, part: Part) -> list[Packed]:
    """Two packs, as hex per tensor. Making them is local work, which may differ between machines: they are
    committed. THINWIRE_WRITE_GOLDEN=1 adds those that are missing."""
    compressor = ROWS[row]
    known = json.loads(PAYLOADS.read_text()) if PAYLOADS.exists() else {}
    if os.environ.get("THINWIRE_WRITE_GOLDEN") == "1" and row not in known:
        packs = [compressor.pack(drawn(part, seed), part, TURN) for seed in (1, 2)]
        known[row] = [[bytes(t.view(torch.uint8).tolist()).hex() for t in p] for p in packs]
        PAYLOADS.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
    return [
        tuple(
            torch.frombuffer(bytearray.fromhex(t), dtype=torch.uint8).view(field.dtype)
            for t, field in zip(tensors, compressor.fields(part), strict=True)
        )
        for tensors in known[row]
    ]


@pytest.mark.parametrize("row", GOLDEN)
def test_committed_packs(row: str, golden: Callable[[dict[str, str]], None]) -> None:
    """Committed packs pass, and decode to committed bits on any machine."""
    part = Part.whole((66, 65))
    x = decoded(ROWS[row], golden_packs(row, part), [1.0, 2.5], part)
    golden({row: blake3(x.numpy().astype("<f4").tobytes()).digest(16).hex()})


# ------------------------------------------------------------------------------------------- none


def test_none_is_the_values_themselves_and_refused_wherever_it_would_be_sent() -> None:
    compressor, part = Nothing(), Part.whole((30, 5))
    x = drawn(part)
    packed = compressor.pack(x, part, TURN)
    assert torch.equal(decoded(compressor, [packed], [1.0], part), x)
    assert compressor.magnitude(packed, part, TURN) == Dense().magnitude(packed, part, TURN)
    with pytest.raises(ConfigError, match="compressor none exchanges nothing"):
        compressor.fields(part)
    with pytest.raises(ConfigError, match="packs of 2 peers"):
        compressor.decode([packed, packed], [1.0, 1.0], part, TURN)
