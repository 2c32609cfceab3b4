"""The contract of compressors: one suite, one row per implementation."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.compressors import (
    EXAMPLES,
    ROWS,
    has_expected_bytes,
    n_bytes_of,
    name_of,
    row_of,
    small_compressors,
)
from tests.support.paths import ROOT
from tests.support.updates import Updated, update
from thinwire.compression import wire
from thinwire.compression.base import Array, Compressor, Packed, Part, Source, Step, Turn
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.none import Nothing
from thinwire.compression.errors import BadPayload, ConfigError
from thinwire.compression.numerics.noise import noise
from thinwire.compression.registry import COMPRESSORS, build_compressor

pytestmark = pytest.mark.usefixtures("one_thread")

PAYLOADS = ROOT / "tests/golden/compressor_payloads.json"
SHAPES = [
    *[(), (1,), (2,), (63,), (64,), (65,), (4096,), (4097,), (7919,)],
    *[(13, 17), (128, 128), (130, 67), (64, 4200), (3, 5, 7), (2, 3, 5, 7), (2, 3, 4, 5, 6)],
    *[(0,), (3, 0)],
]


def turn(round: int) -> Turn:
    return Turn(round=round, shared_seed=8, own_seed=9, lr_factor=1.0)


TURN = turn(7)


@pytest.fixture(params=EXAMPLES)
def compressor(request: pytest.FixtureRequest) -> Compressor:
    return EXAMPLES[request.param]


def test_every_compressor_has_a_row() -> None:
    assert ROWS.keys() == COMPRESSORS.keys() - {"none"}
    for name, row in ROWS.items():
        assert all(type(c) is COMPRESSORS[name] for c in row.examples.values())


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
        assert t.numel() <= field.n_elements
        assert t.numel() == field.n_elements or not row_of(compressor).is_exact(compressor)
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
    for i in range(1, int(200 / row_of(compressor).rate(compressor)) + 1):
        y = decoded(compressor, [compressor.pack(left, part, turn(i))], [1.0], part, turn(i))
        left -= y
        received += y
        if float(left.abs().max()) < 0.1 * float(x.abs().max()):
            break
    else:
        pytest.fail(f"there is {float(left.abs().max())} of {float(x.abs().max())} left")
    assert torch.allclose(left + received, x, atol=1e-4)


def test_zeros(compressor: Compressor) -> None:
    part = Part.whole((5000,))
    packed = compressor.pack(torch.zeros(5000), part, TURN)
    y = decoded(compressor, [packed, packed], [1.0, 2.0], part)
    assert float(y.abs().max()) == 0
    assert negative_zeros(y) == 0
    assert compressor.magnitude(packed, part, TURN) == 0.0


def has_local_groups(compressor: Compressor) -> bool:
    group_size = row_of(compressor).group_size(compressor)
    return group_size is not None and 4096 % group_size == 0


@pytest.mark.parametrize("name", [name for name, c in EXAMPLES.items() if has_local_groups(c)])
def test_a_zero_group_among_others(name: str) -> None:
    compressor, part = EXAMPLES[name], Part.whole((12_288,))
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


def test_magnitudes_are_those_of_the_packs_alone(compressor: Compressor) -> None:
    """To the last bit, of any sizes: parts, groups that are zero, and no packs at all."""
    whole = Part.whole((50, 61))
    packs = [
        compressor.pack(drawn(whole, seed) * 2.0**power, whole, TURN) for seed, power in ((1, 0), (2, 40))
    ]
    packs.append(compressor.pack(torch.zeros(whole.n_global), whole, TURN))
    part = Part(whole.shape, 61, 122)
    (found,) = compressor.magnitudes([{"w": packed} for packed in packs], {"w": part}, TURN)
    assert found == [compressor.magnitude(packed, part, TURN) for packed in packs]
    assert found[0] > 0
    assert found[2] == 0
    assert compressor.magnitudes([], {"w": part}, TURN) == [[]]


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
    entries = compressor.entries(packed, part)
    values = (
        decoded(compressor, [packed], [1.0], part) if entries is None else torch.from_numpy(entries.value_E)
    )
    assert magnitude == pytest.approx(float(values.double().abs().sum()), rel=1e-9)


# ------------------------------------------------------------------------------- many at once, steps, entries


def test_packing_many_is_packing_each(compressor: Compressor) -> None:
    parts = [Part.whole(shape) for shape in SHAPES]
    xs = [drawn(part, i) for i, part in enumerate(parts)]
    many = compressor.pack_many((Source(part, x) for part, x in zip(parts, xs, strict=True)), TURN)
    for part, x, packed in zip(parts, xs, many, strict=True):
        alone = compressor.pack(x, part, TURN)
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(packed, alone, strict=True)
        )


def test_a_fused_update_is_its_formula(compressor: Compressor) -> None:
    """Bit for bit, of several parameters and parts of them."""
    parts = [Part.whole((70, 70)), Part((5000,), 100, 4200), Part.whole((3,)), Part((9,), 4, 4)]
    targets, expected = [], []
    for i, part in enumerate(parts):
        packs = [compressor.pack(drawn(part, seed), part.entire, TURN) for seed in (1, 2)]
        theta = drawn(part, 3 + i)[: part.n_local]
        step = Step(scale=0.375, decay=0.875, sign=i % 2 == 1)
        x = decoded(compressor, packs, [1.0, 2.5], part)
        expected.append(theta * step.decay - (x.sign() if step.sign else x) * step.scale)
        targets.append(Updated(theta.clone(), part, packs, step))
    update(compressor, targets, [1.0, 2.5], TURN)
    for target, x in zip(targets, expected, strict=True):
        assert torch.equal(target.x, x)


def test_decoding_for_a_device_is_decoding(compressor: Compressor) -> None:
    part = Part.whole((300, 7))
    packs = [compressor.pack(drawn(part, seed), part, TURN) for seed in (1, 2)]
    x = compressor.decode_on(torch.device("cpu"), packs, [1.0, 2.5], part, TURN)
    assert torch.equal(x, decoded(compressor, packs, [1.0, 2.5], part))


def test_the_strongest_share_is_a_payload_too(compressor: Compressor) -> None:
    part = Part.whole((100, 120))
    packed = compressor.pack(drawn(part) * torch.arange(12_000.0), part, TURN)
    magnitude = compressor.magnitude(packed, part, TURN)
    for share in (1.0, 0.5, 0.01):
        fewer = compressor.strongest(packed, part, share)
        decoded(compressor, [fewer], [1.0], part)
        assert n_bytes_of(fewer) <= n_bytes_of(packed)
        assert share * magnitude * 0.9 <= compressor.magnitude(fewer, part, TURN) <= magnitude


def test_entries_decode_to_the_mean(compressor: Compressor) -> None:
    """Where peers choose for themselves what they send."""
    part = Part.whole((90, 100))
    packs = [compressor.pack(drawn(part, seed), part, TURN) for seed in range(3)]
    entries = [compressor.entries(packed, part) for packed in packs]
    chosen = [e for e in entries if e is not None]
    if not chosen:
        assert compressor.n_sent(part) <= part.n_global
        return
    for e in chosen:
        assert len(e.value_E) == e.offsets[-1] == compressor.n_sent(part)
        assert bool((e.position_E[1:] > e.position_E[:-1]).all())

    def mean(everybody: Sequence[tuple[Array, Array]], n: int) -> torch.Tensor:
        total = torch.zeros(n)
        for position_E, value_E in everybody:
            total[torch.from_numpy(position_E)] += torch.from_numpy(value_E)
        return total.mul_(torch.tensor(1 / 3))

    for held in (part, Part(part.shape, 70, 6001)):
        expected = decoded(compressor, packs, [1.0] * 3, held)
        assert torch.equal(compressor.decode_entries(chosen, mean, held), expected)


# ------------------------------------------------------------------------------- over the wire


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


def test_what_is_wrong_is_refused_by_its_reason(compressor: Compressor) -> None:
    part = Part.whole((5000,))
    packed = compressor.pack(drawn(part), part, TURN)
    assert survives(compressor, packed, part) is None
    for what, bad, reason in row_of(compressor).bad_payloads(compressor, packed):
        assert survives(compressor, bad, part) == reason, what
    for bad in (
        packed[:-1],
        (*packed, packed[0]),
        (packed[0][None], *packed[1:]),
        (packed[0][:-1], *packed[1:]),
    ):
        assert survives(compressor, bad, part) == "shape"


# ------------------------------------------------------------------------------- scratch, golden bytes


def test_scratch_does_not_grow_with_the_parameter(compressor: Compressor) -> None:
    """That of numpy: a few MB, and 60 bytes per coefficient that has an index."""
    part = Part.whole((500, 4000))
    packed = compressor.pack(drawn(part), part, TURN)
    entries = compressor.entries(packed, part)
    n_entries = 0 if entries is None else len(entries.value_E)
    del entries
    decoded(compressor, [packed], [1.0], part)  # kernels are compiled
    tracemalloc.start()
    try:
        compressor.check(packed, part, TURN)
        compressor.decode([packed], [1.0], part, TURN)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * n_entries + (12 << 20)


IS_WRITING = os.environ.get("THINWIRE_WRITE_GOLDEN") == "1"
GOLDEN_PART = Part.whole((66, 65))


def has_golden_packs(name: str) -> bool:
    """Those that are committed; THINWIRE_WRITE_GOLDEN=1 adds all that are small."""
    n_bytes = sum(f.n_elements * f.dtype.itemsize for f in EXAMPLES[name].fields(GOLDEN_PART))
    return name in json.loads(PAYLOADS.read_text()) or (IS_WRITING and n_bytes < GOLDEN_PART.n_global)


GOLDEN = [name for name in EXAMPLES if has_golden_packs(name)]


def golden_packs(name: str, part: Part) -> list[Packed]:
    """Two packs, as hex per tensor. Making them is local work, which may differ between machines: they are
    committed. THINWIRE_WRITE_GOLDEN=1 adds those that are missing."""
    compressor, known = EXAMPLES[name], json.loads(PAYLOADS.read_text())
    if IS_WRITING and name not in known:
        packs = [compressor.pack(drawn(part, seed), part, TURN) for seed in (1, 2)]
        known[name] = [[bytes(t.view(torch.uint8).tolist()).hex() for t in p] for p in packs]
        PAYLOADS.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n")
    return [
        tuple(
            torch.frombuffer(bytearray.fromhex(t), dtype=torch.uint8).view(field.dtype)
            for t, field in zip(tensors, compressor.fields(part), strict=True)
        )
        for tensors in known[name]
    ]


@pytest.mark.parametrize("name", GOLDEN)
def test_committed_packs(name: str, golden: Callable[[dict[str, str]], None]) -> None:
    """Committed packs pass, and decode to committed bits on any machine."""
    x = decoded(EXAMPLES[name], golden_packs(name, GOLDEN_PART), [1.0, 2.5], GOLDEN_PART)
    golden({name: blake3(x.numpy().astype("<f4").tobytes()).digest(16).hex()})


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
