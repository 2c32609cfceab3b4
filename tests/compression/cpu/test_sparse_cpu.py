"""The compiled paths of `dct_topk` and `topk`: decoding has the reference's bits, packing its choice."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from thinwire.compression.base import Packed, Part, Step, Target, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.groups import Flat
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import BadPayload
from thinwire.compression.numerics.bits import pack_bits, unpack_bits
from thinwire.compression.numerics.noise import noise

pytest.importorskip("numba", reason="the numba kernels are an extra")
from thinwire.compression.cpu import batched_cpu

TURN = Turn(round=7, shared_seed=8, own_seed=9, lr_factor=1.0)
Switch = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """Chooses the kernels."""
    return lambda kernels: monkeypatch.setenv("THINWIRE_KERNELS", kernels)


@pytest.fixture(params=range(100))
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


def drawn_compressor(rng: random.Random) -> Sparse:
    group_size = rng.choice([1, 7, 61, 64, 100, 192, 1000, 4096, 4096, 4099])
    options: dict[str, Any] = {
        "k": rng.randint(1, min(group_size, rng.choice([5, 40, 5000]))),
        "group_size": group_size,
        "bits": rng.choice([1, 2, 4, 8, 16, "e3m0"]),
        "indices": rng.choice(["packed", "rice"]),
    }
    return rng.choice([DctTopK, TopK])(**options)


def drawn_tiles(rng: random.Random) -> tuple[DctTopK, Part]:
    """And a parameter with tiles at its edges that are not full."""
    side = rng.choice([8, 16, 32, 64, 64])
    k, bits = rng.randint(1, rng.choice([5, 40, side * side])), rng.choice([1, 2, 4, 8, 16, "e3m0"])
    compressor = DctTopK(k, side * side, bits, rng.choice(["packed", "rice"]), layout="tiles")
    return compressor, Part.whole((side + rng.randint(0, 150), side * rng.randint(1, 3) + rng.randint(0, 9)))


def drawn_values(rng: random.Random, n: int) -> torch.Tensor:
    """Some groups are zero, some have few values of which many are equal, some are tiny."""
    x = noise("gauss", rng.getrandbits(60), 0, 0, 0, n) * 2.0 ** rng.choice([0, 0, -10, -100, -126, 40])
    if rng.random() < 0.3:
        x[rng.randrange(n) :] = 0
    if rng.random() < 0.3:
        x = x.sign() * x.abs().max()
    if rng.random() < 0.3:
        x[: n // 2] *= 2.0**-90
    return x


def drawn_packs(rng: random.Random, compressor: Sparse, part: Part) -> list[Packed]:
    packs = [
        compressor.pack(drawn_values(rng, part.n_global), part, TURN) for _ in range(rng.choice([1, 2, 5]))
    ]
    for packed in packs:
        compressor.check(packed, part, TURN)
    return packs


def drawn_part(rng: random.Random) -> Part:
    n = rng.choice([1, 2, 63, 64, 65, 127, 4096, 7919, 10007, rng.randint(1, 30_000)])
    return Part.whole((n,))


def drawn(rng: random.Random) -> tuple[Sparse, Part]:
    return drawn_tiles(rng) if rng.random() < 0.35 else (drawn_compressor(rng), drawn_part(rng))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ------------------------------------------------------------------------------------------- decode: exact


def test_decoding_has_the_bits_of_the_reference(rng: random.Random, use: Switch) -> None:
    """Any compressor, number of peers, weights and shard; plain, and as a step of a replica."""
    compressor, whole = drawn(rng)
    use(rng.choice(["torch", "numba"]))
    packs = drawn_packs(rng, compressor, whole)
    weights = [rng.choice([1.0, 0.0, 2.5, 1e6, 1e-3]) for _ in packs]
    start = rng.randrange(whole.n_global)
    for part in (whole, Part(whole.shape, start, rng.randint(start, whole.n_global))):
        use("torch")
        expected = compressor.decode(packs, weights, part, TURN)
        use("numba")
        assert same_bits(compressor.decode(packs, weights, part, TURN), expected)
        step = Step(rng.choice([1.0, 0.37, 0.0, -0.5]), rng.choice([1.0, 0.875, 0.999]), rng.random() < 0.5)
        theta = drawn_values(rng, part.n_local + 1)[:-1]
        theta[::7] = -0.0
        targets = []
        for kernels in ("torch", "numba"):
            use(kernels)
            targets.append(theta.clone())
            compressor.fused_update([Target(targets[-1], part, packs, step)], weights, TURN)
        assert same_bits(*targets)


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
        compressor.fused_update([Target(target, part, [packed], step)], [1.0], TURN)
        decayed, moved = theta * 0.9990000128746033, (x.sign() if sign else x) * 0.0030000000260770321
        assert same_bits(target, decayed - moved)


def test_any_number_of_threads(use: Switch) -> None:
    compressor, part = DctTopK(), Part.whole((700_001,))
    x = noise("gauss", 3, 0, 0, 0, part.n_global)
    use("numba")
    before = torch.get_num_threads()
    packs, values = [], []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            packs.append(compressor.pack(x, part, TURN))
            values.append(compressor.decode(packs[:1] * 3, [1.0, 2.0, 0.5], part, TURN))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for p in packs for a, b in zip(p, packs[0], strict=True))
    assert all(same_bits(v, values[0]) for v in values)


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


# ------------------------------------------------------------------------------------------- pack: local


@pytest.mark.parametrize("rng", range(40), indirect=True)
def test_what_is_selected(rng: random.Random, use: Switch) -> None:
    """The same coefficients as the reference's, but for those that are equal within rounding."""
    compressor, part = drawn(rng)
    x = drawn_values(rng, part.n_global)
    found = {}
    for kernels in ("torch", "numba"):
        use(kernels)
        found[kernels] = list(compressor.selected(x, part.shape))
    index, value = (torch.cat([p[i].reshape(-1) for p in found["numba"]]) for i in (0, 1))
    index_torch, value_torch = (torch.cat([p[i].reshape(-1) for p in found["torch"]]) for i in (0, 1))
    if isinstance(compressor, TopK):
        assert torch.equal(index, index_torch)
        assert same_bits(value, value_torch)
        return
    assert index.shape == index_torch.shape
    # Coefficients are up to 8 times as large as elements, of tiles up to 64 times.
    close = (
        1e-6
        * float(x.abs().max())
        * (8 if isinstance(compressor.pack_layout.groups(part.shape), Flat) else 64)
    )
    for (rows, values), (_, values_torch) in zip(found["numba"], found["torch"], strict=False):
        assert bool((rows[:, 1:] > rows[:, :-1]).all())
        if values.shape == values_torch.shape:
            a, b = values.abs().sort(dim=1).values, values_torch.abs().sort(dim=1).values
            assert bool((a - b).abs().max() <= close)
    same = index == index_torch
    assert bool(((value - value_torch).abs()[same] <= close).all())
    energy, energy_torch = value.double().square().sum(), value_torch.double().square().sum()
    assert abs(float(energy - energy_torch)) <= 1e-5 * float(energy_torch)


@pytest.mark.parametrize("rng", range(40), indirect=True)
def test_the_packs_are_those_of_the_reference_where_nothing_is_rounded(
    rng: random.Random, use: Switch
) -> None:
    compressor, part = drawn_compressor(rng), drawn_part(rng)
    if isinstance(compressor, DctTopK):
        compressor = TopK(compressor.k, compressor.group_size, compressor.bits, compressor.indices)
    x = drawn_values(rng, part.n_global)
    use("torch")
    expected = compressor.pack(x, part, TURN)
    use("numba")
    packed = compressor.pack(x, part, TURN)
    assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))


def test_ties_go_to_the_lower_index(use: Switch) -> None:
    use("numba")
    x = torch.ones(4096)
    x[1::2] = -1
    x[4000] = 2
    ((index, value),) = TopK(k=5).selected(x, (4096,))
    assert index.tolist() == [[0, 1, 2, 3, 4000]]
    assert value.tolist() == [[1, -1, 1, -1, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.0**59, -(2.0**60)])
@pytest.mark.parametrize("compressor", [DctTopK(), TopK(), DctTopK(k=3, group_size=100)], ids=str)
def test_values_that_cannot_be_sent(compressor: Sparse, value: float, use: Switch) -> None:
    x = noise("gauss", 3, 0, 0, 0, 9000)
    x[8999 if compressor.k > 3 else 5] = value * (9 if abs(value) < float("inf") else 1)
    for kernels in ("torch", "numba"):
        use(kernels)
        with pytest.raises(ValueError, match="not finite, or not below"):
            compressor.pack(x, Part.whole((9000,)), TURN)


def test_views_and_other_types(use: Switch) -> None:
    """Not contiguous, bfloat16, of a parameter that requires a gradient, and empty."""
    use("numba")
    compressor, part = DctTopK(k=4, group_size=256), Part.whole((5000,))
    x = noise("gauss", 3, 0, 0, 0, 10_000)
    expected = compressor.pack(x[::2].clone(), part, TURN)
    for view in (x[::2], x[::2].clone().requires_grad_()):
        assert all(
            torch.equal(a, b) for a, b in zip(compressor.pack(view, part, TURN), expected, strict=True)
        )
    rounded = x[::2].bfloat16()
    packs = compressor.pack(rounded, part, TURN), compressor.pack(rounded.float(), part, TURN)
    assert all(torch.equal(a, b) for a, b in zip(*packs, strict=True))
    for shape in [(0,), (3, 0)]:
        empty = compressor.pack(torch.zeros(prod(shape)), Part.whole(shape), TURN)
        assert compressor.decode([empty], [1.0], Part.whole(shape), TURN).shape == (0,)


@pytest.mark.parametrize("width", [1, 3, 8, 13, 17, 31, 32])
def test_bits(width: int, use: Switch) -> None:
    rng = random.Random(width)
    values = torch.tensor([rng.getrandbits(width) for _ in range(1003)])
    packed, unpacked = [], []
    for kernels in ("torch", "numba"):
        use(kernels)
        packed.append(pack_bits(values, width))
        unpacked.append(unpack_bits(packed[-1], width, 1003))
        for bad in (-1, 1 << width):
            with pytest.raises(ValueError, match="do not fit"):
                pack_bits(torch.tensor([0, bad, 1]), width)
    assert torch.equal(*packed)
    assert torch.equal(*unpacked)
    assert torch.equal(unpacked[0], values)


# ------------------------------------------------------------------------------------------- several at once


@pytest.mark.parametrize("seed", range(12))
def test_several_at_once_are_those_one_by_one(seed: int, use: Switch) -> None:
    """Packs, and steps of shards of any parameters, some of them without groups."""
    rng = random.Random(seed)
    use("numba")
    kind = rng.choice([DctTopK, TopK])
    group_size = rng.choice([61, 64, 192, 4096])
    compressor = kind(rng.randint(1, 40), group_size, rng.choice([1, 2, 4, 8, "e3m0"]), "packed")
    parts = [Part.whole((rng.choice([1, 64, 4096, 5000, 12_345]),)) for _ in range(rng.randint(1, 6))]
    xs = [[drawn_values(rng, part.n_global) for part in parts] for _ in range(3)]
    together = [batched_cpu.pack(compressor.pack_layout, x, [p.shape for p in parts]) for x in xs]
    for x, packs in zip(xs, together, strict=True):
        for values, part, packed in zip(x, parts, packs, strict=True):
            compressor.check(packed, part, TURN)
            alone = compressor.pack(values, part, TURN)
            assert all(torch.equal(a, b) for a, b in zip(packed, alone, strict=True))
    targets, alone_targets = [], []
    for i, whole in enumerate(parts):
        start = rng.randint(0, whole.n_global)
        part = rng.choice([whole, Part(whole.shape, start, rng.randint(start, whole.n_global))])
        step = Step(rng.choice([1.0, 0.37, -0.5]), rng.choice([1.0, 0.999]), rng.random() < 0.5)
        theta, packs = drawn_values(rng, part.n_local + 1)[:-1], [packs[i] for packs in together]
        targets.append(Target(theta, part, packs, step))
        alone_targets.append(Target(theta.clone(), part, packs, step))
    weights = [1.0, 0.0, 2.5]
    compressor.fused_update(targets, weights, TURN)
    for t, alone_t in zip(targets, alone_targets, strict=True):
        compressor.fused_update([alone_t], weights, TURN)
        assert same_bits(t.x, alone_t.x)
    short = [(scales, codes[:-1]) for scales, codes in targets[0].packs]
    with pytest.raises(BadPayload):
        compressor.fused_update([replace(targets[0], packs=short)], weights, TURN)
