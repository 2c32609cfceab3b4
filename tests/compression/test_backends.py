"""Compiled kernels against the reference: decoding and updating have its bits, packing its choice.

Triton's kernels have the same cases, in gpu/test_triton.py (interpreted, in a process of their own) and in
test_cuda.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from tests.support.updates import Updated, update
from thinwire.compression.base import (
    Change,
    Compressor,
    Moved,
    Packed,
    Part,
    Senders,
    Source,
    Step,
    Turn,
)
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.dense_codec import GroupedCodec, dense_codec
from thinwire.compression.codecs.groups import Flat
from thinwire.compression.codecs.random_k import RandomK
from thinwire.compression.codecs.slicing import Slicing
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import BadPayload
from thinwire.compression.numerics.noise import noise
from thinwire.compression.numerics.value_formats import FORMATS

pytest.importorskip("numba", reason="the numba kernels are an extra")

TURN = Turn(round=7, shared_seed=8, own_seed=9, lr_factor=1.0)
Switch = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Chooses the kernels."""
    return lambda kernels: monkeypatch.setenv("THINWIRE_KERNELS", kernels)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many torch may use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- what is drawn


def drawn_sparse(rng: random.Random) -> tuple[Sparse, Part]:
    """Flat groups of any size, or tiles of which those at the edges are not full."""
    how: dict[str, Any] = {"bits": rng.choice([*FORMATS]), "indices": rng.choice(["packed", "rice"])}
    if rng.random() < 0.35:
        side = rng.choice([8, 16, 32, 64, 64])
        k = rng.randint(1, rng.choice([5, 40, side * side]))
        shape = side + rng.randint(0, 150), side * rng.randint(1, 3) + rng.randint(0, 9)
        return DctTopK(k, side * side, layout="tiles", **how), Part.whole(shape)
    group_size = rng.choice([1, 7, 61, 64, 100, 192, 1000, 4096, 4096, 4099])
    k = rng.randint(1, min(group_size, rng.choice([5, 40, 5000])))
    n = rng.choice([1, 2, 63, 64, 65, 127, 4096, 7919, 10007, rng.randint(1, 30_000)])
    return rng.choice([DctTopK, TopK])(k, group_size, **how), Part.whole((n,))


def drawn_dense(rng: random.Random, bits: Any) -> tuple[Dense | Slicing | RandomK, Part]:
    how: dict[str, Any] = {"bits": bits, "group_size": rng.choice([8, 16, 24, 64, 1000, 1024])}
    n = rng.choice([1, 7, 8, 63, 1024, 1025, 4096, 7919, rng.randint(1, 300_000)])
    if rng.random() < 0.6:
        return Dense(**how), Part.whole((n,))
    return rng.choice([Slicing, RandomK])(rate=rng.choice([1.0, 0.3, 1 / 7]), **how), Part.whole((n,))


def drawn_values(rng: random.Random, n: int) -> torch.Tensor:
    """Zero stretches and tiny ones, equal values, halves between two codes, denormals, -0."""
    x = noise("gauss", rng.getrandbits(60), 0, 0, 0, n) * 2.0 ** rng.choice([0, 0, -10, -100, -126, -140, 40])
    for _ in range(rng.randrange(3)):
        first = rng.randrange(n) // 64 * 64
        x[first : first + rng.choice([64, 3000])] *= rng.choice([0.0, -0.0, 2.0**-20, 2.0**-90, 2.0**-149])
    if rng.random() < 0.2:
        x = (x / x.abs().amax().clamp(min=2.0**-120) * 14).round() / 2
    if rng.random() < 0.2:
        x = x.sign() * x.abs().max()
    if rng.random() < 0.2:
        x = x.sign() * 2.0 ** torch.arange(n).remainder(9)
    return x


CASES: dict[str, Callable[[random.Random], tuple[Compressor, Part]]] = {
    **{f"sparse {seed}": drawn_sparse for seed in range(100)},
    **{
        f"dense {bits} {seed}": lambda rng, bits=bits: drawn_dense(rng, bits)  # type: ignore[misc]
        for bits in FORMATS
        for seed in range(20)
    },
}
every_case = pytest.mark.parametrize("case", CASES)


def bits_of(tensors: Iterator[torch.Tensor] | Packed) -> list[list[int]]:
    return [t.view(torch.uint8).tolist() for t in tensors]


# ------------------------------------------------------------------------------------------- decode: exact


@every_case
def test_decoding_and_updating_have_the_bits_of_the_reference(case: str, use: Switch) -> None:
    """Any compressor, number of peers, weights and shard; plain, and as a step of a replica; and norms."""
    rng = random.Random(case)
    compressor, whole = CASES[case](rng)
    use(rng.choice(["torch", "numba"]))
    packs = [
        compressor.pack(drawn_values(rng, whole.n_global), whole, TURN) for _ in range(rng.choice([1, 2, 5]))
    ]
    weights = [rng.choice([1.0, 0.0, 2.5, 1e6, 1e-3]) for _ in packs]
    start = rng.randrange(whole.n_global)
    for part in (whole, Part(whole.shape, start, rng.randint(start, whole.n_global))):
        step = Step(rng.choice([1.0, 0.37, 0.0, -0.5]), rng.choice([1.0, 0.875, 0.999]), rng.random() < 0.5)
        theta = drawn_values(rng, part.n_local + 1)[:-1]
        theta[::7] = -0.0
        found = {}
        for kernels in ("torch", "numba"):
            use(kernels)
            for packed in packs:
                compressor.check(packed, whole, TURN)
            target = Updated(theta.clone(), part, packs, step)
            update(compressor, [target], weights, TURN)
            decoded = compressor.decode(packs, weights, part, TURN)
            magnitudes = [compressor.magnitude(packed, part, TURN) for packed in packs]
            payloads = [{"a": packed, "b": packs[0]} for packed in packs]
            assert compressor.magnitudes(payloads, {"a": part, "b": part}, TURN) == [
                magnitudes,
                magnitudes[:1] * len(packs),
            ]
            found[kernels] = bits_of((decoded, target.x)), magnitudes
        assert found["numba"] == found["torch"]


@pytest.mark.parametrize("seed", range(8))
def test_means_over_senders_have_the_bits_of_the_reference(seed: int, use: Switch) -> None:
    rng = random.Random(seed)
    compressor, whole = drawn_sparse(rng)
    use("torch")
    n_packs = rng.choice([1, 2, 5])
    packs = [compressor.pack(drawn_values(rng, whole.n_global), whole, TURN) for _ in range(n_packs)]
    weights = [rng.choice([1.0, 0.0, 2.5, 1e6]) for _ in packs]
    senders = Senders([w * rng.choice([1.0, 2.0]) for w in weights], rng.choice([0.25, 1.0, 3e5]))
    start = rng.randrange(whole.n_global)
    for part in (whole, Part(whole.shape, start, rng.randint(start, whole.n_global))):
        found = {}
        for kernels in ("torch", "numba"):
            use(kernels)
            mean = compressor.decode_senders(torch.device("cpu"), packs, weights, senders, part, TURN)
            found[kernels] = bits_of((mean,))
        assert found["numba"] == found["torch"]


def test_the_step_is_the_formula(use: Switch) -> None:
    """One rounding per operation: a fused multiply-add would differ."""
    compressor, part = DctTopK(k=64, bits=8), Part.whole((40_000,))
    packed = compressor.pack(noise("gauss", 3, 0, 0, 0, part.n_global), part, TURN)
    theta = noise("gauss", 4, 0, 0, 0, part.n_global)
    use("numba")
    x = compressor.decode([packed], [1.0], part, TURN)
    for sign in (False, True):
        target = theta.clone()
        step = Step(0.0030000000260770321, 0.9990000128746033, sign)
        update(compressor, [Updated(target, part, [packed], step)], [1.0], TURN)
        decayed, moved = theta * 0.9990000128746033, (x.sign() if sign else x) * 0.0030000000260770321
        assert torch.equal(target.view(torch.int32), (decayed - moved).view(torch.int32))


@pytest.mark.parametrize("compressor", [DctTopK(), TopK(), *(Dense(bits=b) for b in FORMATS)], ids=str)
def test_any_number_of_threads(compressor: Compressor, use: Switch, threads: Callable[[int], None]) -> None:
    """Groups that are zero leave no gaps, whichever thread had them."""
    use("numba")
    part = Part.whole((700_001,))
    x = noise("gauss", 3, 0, 0, 0, part.n_global)
    x[100_000:200_000] = 0
    x[650_000:] = 0
    found = []
    for n_threads in (1, 2, 3):
        threads(n_threads)
        packed = compressor.pack(x, part, TURN)
        compressor.check(packed, part, TURN)
        decoded = compressor.decode([packed] * 3, [1.0, 2.0, 0.5], part, TURN)
        found.append([t.view(torch.uint8) for t in (*packed, decoded)])
    assert all(torch.equal(a, b) for row in found[1:] for a, b in zip(row, found[0], strict=True))


def test_packs_that_nobody_checked_do_no_harm(use: Switch) -> None:
    """Indices past the end, and codes that are missing: an error, and no memory of others is touched."""
    use("numba")
    compressor, part = TopK(k=8, group_size=100, indices="packed"), Part.whole((1000,))
    scales, codes = compressor.pack(noise("gauss", 3, 0, 0, 0, 1000), part, TURN)
    with pytest.raises(IndexError, match="were not checked"):
        compressor.decode([(scales, torch.full_like(codes, 255))], [1.0], part, TURN)
    for packed in [(scales, codes[:-1]), (scales[:-1], codes)]:
        with pytest.raises(BadPayload):
            compressor.decode([packed], [1.0], part, TURN)


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (8, 128), ("e3m0", 8), (16, 0x8000), (16, 0x4001)])
def test_codes_without_a_value_are_refused(bits: Any, code: int, use: Switch) -> None:
    x = noise("gauss", 3, 0, 0, 0, 1001)
    codec = dense_codec(bits, 1024)
    assert isinstance(codec, GroupedCodec)
    for kernels in ("torch", "numba"):
        use(kernels)
        scales, codes = codec.pack([x])
        codec.check((scales, codes), 1001)
        wrong = codes.clone()
        wrong[300] = code & 255 if bits not in {4, "e3m0"} else code << 4 | 1
        if bits == 16:
            wrong[301] = code >> 8
        with pytest.raises(BadPayload, match=r"code|float16"):
            codec.check((scales, wrong), 1001)


# ------------------------------------------------------------------------------------------- pack: local


@every_case
def test_the_packs_are_those_of_the_reference_where_nothing_is_rounded(case: str, use: Switch) -> None:
    """Cosine coefficients are, so that of them the elements themselves are packed."""
    rng = random.Random(case)
    compressor, part = CASES[case](rng)
    if isinstance(compressor, DctTopK):
        compressor = TopK(compressor.k, compressor.group_size, compressor.bits, compressor.indices)
    x = drawn_values(rng, part.n_global)
    packs = []
    for kernels in ("torch", "numba"):
        use(kernels)
        packs.append(bits_of(compressor.pack(x, part, TURN)))
    assert packs[1] == packs[0]


@pytest.mark.parametrize("seed", range(40))
def test_what_is_selected(seed: int, use: Switch) -> None:
    """The same coefficients as the reference's, but for those that are equal within rounding."""
    rng = random.Random(seed)
    compressor, part = drawn_sparse(rng)
    x = drawn_values(rng, part.n_global)
    found = {}
    for kernels in ("torch", "numba"):
        use(kernels)
        found[kernels] = list(compressor.selected(x, part.shape))
    index, value = (torch.cat([p[i].reshape(-1) for p in found["numba"]]) for i in (0, 1))
    index_torch, value_torch = (torch.cat([p[i].reshape(-1) for p in found["torch"]]) for i in (0, 1))
    if isinstance(compressor, TopK):
        assert torch.equal(index, index_torch)
        assert torch.equal(value.view(torch.int32), value_torch.view(torch.int32))
        return
    assert index.shape == index_torch.shape
    # Coefficients are up to 8 times as large as elements, of tiles up to 64 times.
    growth = 8 if isinstance(compressor.pack_layout.groups(part.shape), Flat) else 64
    close = 1e-6 * float(x.abs().max()) * growth
    for (rows, values), (_, values_torch) in zip(found["numba"], found["torch"], strict=False):
        assert bool((rows[:, 1:] > rows[:, :-1]).all())
        if values.shape == values_torch.shape:
            a, b = values.abs().sort(dim=1).values, values_torch.abs().sort(dim=1).values
            assert bool((a - b).abs().max() <= close)
    same = index == index_torch
    assert bool(((value - value_torch).abs()[same] <= close).all())
    energy, energy_torch = value.double().square().sum(), value_torch.double().square().sum()
    assert abs(float(energy - energy_torch)) <= 1e-5 * float(energy_torch)


def test_ties_go_to_the_lower_index(use: Switch) -> None:
    use("numba")
    x = torch.ones(4096)
    x[1::2] = -1
    x[4000] = 2
    ((index, value),) = TopK(k=5).selected(x, (4096,))
    assert index.tolist() == [[0, 1, 2, 3, 4000]]
    assert value.tolist() == [[1, -1, 1, -1, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**59, -(2.0**60)])
@pytest.mark.parametrize(
    "compressor",
    [DctTopK(), TopK(), DctTopK(k=3, group_size=100), *(Dense(bits=b) for b in FORMATS)],
    ids=str,
)
def test_values_that_cannot_be_sent(compressor: Compressor, value: float, use: Switch) -> None:
    x = noise("gauss", 3, 0, 0, 0, 9000)
    for at in (5, 8999):
        bad = x.clone()
        bad[at] = value * (9 if abs(value) < float("inf") else 1)  # a coefficient is as large, too
        for kernels in ("torch", "numba"):
            use(kernels)
            with pytest.raises(ValueError, match="not finite, or not below"):
                compressor.pack(bad, Part.whole((9000,)), TURN)


def test_views_and_other_types(use: Switch) -> None:
    """Not contiguous, bfloat16, of a parameter that requires a gradient, and empty."""
    use("numba")
    compressor, part = DctTopK(k=4, group_size=256), Part.whole((5000,))
    x = noise("gauss", 3, 0, 0, 0, 10_000)
    expected = bits_of(compressor.pack(x[::2].clone(), part, TURN))
    for view in (x[::2], x[::2].clone().requires_grad_()):
        assert bits_of(compressor.pack(view, part, TURN)) == expected
    rounded = x[::2].bfloat16()
    packs = compressor.pack(rounded, part, TURN), compressor.pack(rounded.float(), part, TURN)
    assert bits_of(packs[0]) == bits_of(packs[1])
    for shape in [(0,), (3, 0)]:
        empty = compressor.pack(torch.zeros(prod(shape)), Part.whole(shape), TURN)
        assert compressor.decode([empty], [1.0], Part.whole(shape), TURN).shape == (0,)


# ------------------------------------------------------------------------------------------- batched


@pytest.mark.parametrize("seed", range(12))
def test_batches_are_those_of_the_reference(seed: int, use: Switch) -> None:
    """Packs, and steps of shards of any parameters, some of them without groups."""
    rng = random.Random(seed)
    use("numba")
    kind, group_size = rng.choice([DctTopK, TopK]), rng.choice([61, 64, 192, 4096])
    how = rng.choice([1, 2, 4, 8, "e3m0"]), rng.choice(["packed", "rice"])
    compressor = kind(rng.randint(1, 40), group_size, *how)
    parts = [Part.whole((rng.choice([1, 64, 4096, 5000, 12_345]),)) for _ in range(rng.randint(1, 6))]
    xs = [[drawn_values(rng, part.n_global) for part in parts] for _ in range(3)]
    packs = [compressor.pack_many(map(Source, parts, row), TURN) for row in xs]
    for row, together in zip(xs, packs, strict=True):
        alone = [compressor.pack(x, part, TURN) for x, part in zip(row, parts, strict=True)]
        assert [bits_of(p) for p in together] == [bits_of(p) for p in alone]
    targets = []
    for i, whole in enumerate(parts):
        start = rng.randint(0, whole.n_global)
        part = rng.choice([whole, Part(whole.shape, start, rng.randint(start, whole.n_global))])
        step = Step(rng.choice([1.0, 0.37, -0.5]), rng.choice([1.0, 0.999]), rng.random() < 0.5)
        theta = drawn_values(rng, part.n_local + 1)[:-1]
        targets.append(Updated(theta, part, [together[i] for together in packs], step))
    weights = [1.0, 0.0, 2.5]
    copies = [replace(t, x=t.x.clone()) for t in targets]
    senders = rng.choice([None, Senders([1.0, 2.0, 2.5], rng.choice([0.25, 3.0]))])
    update(compressor, targets, weights, TURN, senders)
    short = [(scales, codes[: codes.numel() // 2]) for scales, codes in targets[0].packs]
    if any(codes.numel() for _, codes in targets[0].packs):
        with pytest.raises(BadPayload):
            update(compressor, [replace(targets[0], packs=short)], weights, TURN)
    use("torch")
    update(compressor, copies, weights, TURN, senders)
    assert bits_of(t.x for t in targets) == bits_of(t.x for t in copies)


@pytest.mark.parametrize("seed", range(10))
def test_a_fused_send_is_a_step_of_the_momentum_a_pack_and_a_subtraction(seed: int, use: Switch) -> None:
    rng = random.Random(seed)
    use("numba")
    kind, group_size = rng.choice([DctTopK, TopK]), rng.choice([61, 64, 192, 4096])
    how = rng.choice([1, 4, 8, "e3m0"]), rng.choice(["packed", "rice"])
    compressor = kind(rng.randint(1, 40), group_size, *how)
    parts = [Part.whole((rng.choice([1, 64, 5000, 40_000]),)) for _ in range(rng.randint(1, 4))]
    momenta = [drawn_values(rng, part.n_global) for part in parts]
    gradients = [rng.choice([None, drawn_values(rng, part.n_global)]) for part in parts]
    decay, factor, scale, alpha = (
        0.5,
        rng.choice([0.25, 0.5]),
        rng.choice([0.0, 1.0]),
        rng.choice([1.0, 0.75]),
    )
    plain = [x * decay for x in momenta]
    for x, gradient in zip(plain, gradients, strict=True):
        if gradient is not None and scale:
            x.add_(gradient * (factor * scale))
    packs = compressor.pack_many(map(Source, parts, plain), TURN)
    targets = [
        Updated(x, part, [packed], Step(alpha)) for x, part, packed in zip(plain, parts, packs, strict=True)
    ]
    update(compressor, targets, [1.0], TURN)
    assert compressor.has_fused_send(list(zip(parts, momenta, strict=True)))
    sources = [Source(p, x, g, factor) for p, x, g in zip(parts, momenta, gradients, strict=True)]
    sent = compressor.fused_send(sources, Change(decay, torch.tensor(scale), alpha))
    assert [bits_of(p) for p in sent.packs()] == [bits_of(p) for p in packs]
    assert all(torch.equal(x, y) for x, y in zip(momenta, plain, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_sending_what_has_moved_in_one_pass(seed: int, use: Switch, threads: Callable[[int], None]) -> None:
    rng = random.Random(seed)
    compressor = Dense(bits=rng.choice([4, 8, 16, "e3m0"]), group_size=rng.choice([8, 128, 1024]))
    part = Part.whole((rng.choice([1, 65, 5000, 300_001]),))
    leftover, start, end = (drawn_values(rng, part.n_global) for _ in range(3))
    decay = rng.choice([1.0, 0.95])
    use("torch")
    expected = leftover * decay + (start - end)
    packed = compressor.pack(expected, part, TURN)
    expected.sub_(compressor.decode([packed], [1.0], part, TURN))
    assert not compressor.takes_moved()
    use("numba")
    threads(rng.choice([1, 3]))
    assert compressor.takes_moved()
    sent = compressor.send_moved(Moved(part, leftover, start, end), decay)
    assert bits_of(sent) == bits_of(packed)
    assert bits_of((leftover, end)) == bits_of((expected, start))


def test_what_cannot_be_sent_in_one_pass(use: Switch) -> None:
    use("numba")
    assert not any(d.takes_moved() for d in (Dense(), Dense(bits=1), Dense(bits=2), Dense(bits=4, zstd=True)))
    leftover, start, end = torch.zeros(3, 64)
    start[3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        Dense(bits=4, group_size=8).send_moved(Moved(Part.whole((64,)), leftover, start, end), 1.0)


def spoilt(rng: random.Random, packed: Packed) -> Packed:
    """With a bit, a byte, a scale or an element more or less, or exchanged."""
    scales, codes = (t.clone() for t in packed)
    at, place = rng.randrange(max(1, codes.numel())), rng.randrange(scales.numel())
    match rng.randrange(6):
        case 0 if codes.numel():
            codes[at] ^= 1 << rng.randrange(8)
        case 1 if codes.numel():
            codes[-1] ^= 1 << rng.randrange(8)
        case 2:
            codes = torch.cat([codes[:at], codes[at + 1 :]])
        case 3:
            codes = torch.cat([codes, torch.zeros(rng.randint(1, 2), dtype=torch.uint8)])
        case 4:
            scales[place] = rng.choice([0.0, 1.0, -1.0, 2.0**60, float("nan")])
        case _:
            scales = rng.choice([scales[:-1], torch.cat([scales, scales[:1]]), scales.float()])
    return scales, codes


@pytest.mark.parametrize("seed", range(20))
def test_checks_together_let_through_what_checks_alone_do(seed: int, use: Switch) -> None:
    rng = random.Random(seed)
    use("numba")
    compressor, _ = drawn_sparse(rng)
    parts = [Part.whole((rng.choice([1, 64, 5000, 12_345]),)) for _ in range(rng.randint(1, 4))]
    sources = [Source(part, drawn_values(rng, part.n_global)) for part in parts]
    packs = compressor.pack_many(sources, TURN)
    wholes = {str(i): part for i, part in enumerate(parts)}
    compressor.check_all(dict(zip(wholes, packs, strict=True)), wholes, TURN)
    for _ in range(30):
        i = rng.randrange(len(parts))
        bad = [*packs[:i], spoilt(rng, packs[i]), *packs[i + 1 :]]
        found = []
        for kernels in ("torch", "numba"):
            use(kernels)
            try:
                compressor.check_all(dict(zip(wholes, bad, strict=True)), wholes, TURN)
                found.append("good")
            except BadPayload as e:
                found.append(str(e))
        assert found[1] == found[0]
