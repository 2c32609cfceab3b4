"""Noise: known answers, layout, slices, both kernels bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from blake3 import blake3

from thinwire.compression.exact import to_float32
from thinwire.compression.kernels import is_installed
from thinwire.compression.numerics.noise import (
    combine,
    initial_values,
    noise,
    perturb,
    uniform_words,
    update_,
    update_all_,
    update_pieces_,
)
from thinwire.compression.numerics.noise_layout import NoiseKind, Piece, Probe, Purpose, Update, Where
from thinwire.compression.numerics.philox import philox4x32
from thinwire.compression.numerics.quantiles import NORMAL_256
from thinwire.compression.numerics.rounding import round_to_bfloat16

KINDS: tuple[NoiseKind, ...] = ("sign", "gauss")
SEED = 0x0123456789ABCDEF
MASK = 0xFFFFFFFF


def philox_by_hand(counter: list[int], seed: int) -> list[int]:
    """Philox4x32-10 in Python integers, written from the paper: the oracle of this file."""
    x, k = list(counter), [seed & MASK, seed >> 32]
    for _ in range(10):
        p0, p1 = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(p1 >> 32) ^ x[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ x[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return x


def element_by_hand(kind: NoiseKind, seed: int, param_index: int, probe: int, i: int) -> float:
    block, e = divmod(i, 4096)
    if kind == "sign":
        (lane, c), calls = divmod(e % 128, 32), 32
    else:
        (lane, c), calls = divmod(e % 1024, 256), 256
    number = block * calls + c
    fourth = probe + ((0 if kind == "sign" else 1) << 20)
    word = philox_by_hand([number & MASK, number >> 32, param_index, fourth], seed)[lane]
    if kind == "sign":
        return -1.0 if word >> (e // 128) & 1 else 1.0
    return NORMAL_256[word >> 8 * (e // 1024) & 255]


def ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.float32)


def random_values(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter: list[int], key: list[int], answer: list[int]) -> None:
    low, high = (torch.tensor([c], dtype=torch.int64) for c in counter[:2])
    seed = key[0] | key[1] << 32
    words = philox4x32((low, high, counter[2], counter[3]), seed)
    assert [int(w) for w in words] == answer
    assert philox_by_hand(counter, seed) == answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 4095, 2**32 - 3, 2**37 - 2, 2**45 + 4095])
def test_layout(kernels: str, kind: NoiseKind, start: int) -> None:
    """Every element is where the module's docstring says, also past 2^32 calls."""
    z = noise(kind, SEED, 7, 5, start, start + 5000)
    for i in [0, 1, 2, 127, 128, 1023, 1024, 4095, 4096, 4999]:
        assert z[i] == element_by_hand(kind, SEED, 7, 5, start + i)


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_slices(kernels: str, kind: NoiseKind) -> None:
    whole = noise(kind, SEED, 0, 0, 0, 300_000)
    for a, b in [(0, 0), (0, 1), (1, 2), (4095, 4097), (4096, 8192), (5000, 299_999), (262_143, 262_145)]:
        assert torch.equal(noise(kind, SEED, 0, 0, a, b), whole[a:b])


def test_committed_noise(kernels: str, golden: Callable[[dict[str, str]], None]) -> None:
    drawn = {
        f"{kind} {seed:x} {param_index} {probe} {start}": noise(
            kind, seed, param_index, probe, start, start + 9999
        )
        for kind in KINDS
        for seed, param_index, probe, start in [
            (0, 0, 0, 0),
            (2**64 - 1, 3, 2**20 - 1, 77),
            (SEED, MASK, 1, 2**40),
        ]
    }
    drawn["initial"] = initial_values(SEED, 2, 100, 9000, 0.02)
    golden({name: blake3(z.numpy().astype("<f4").tobytes()).digest(16).hex() for name, z in drawn.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_distribution(kind: NoiseKind) -> None:
    z = noise(kind, SEED, 0, 0, 0, 1 << 20).double()
    assert abs(float(z.mean())) < 0.005
    assert abs(float(z.var()) - 1) < 0.005
    if kind == "gauss":
        assert abs(float((z**4).mean()) - 3) < 0.1


def test_table_is_antisymmetric_and_has_unit_variance() -> None:
    table = np.array(NORMAL_256, dtype=np.float32)
    assert [float(str(x)) for x in table] == list(NORMAL_256)  # the literals are shortest float32 decimals
    table = table.astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert np.all(np.diff(table) > 0)
    assert abs(float((table**2).mean()) - 1) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_streams_differ(kind: NoiseKind) -> None:
    """Seed (both halves), parameter and probe each give noise of their own."""
    n = 1 << 16
    streams = [
        noise(kind, seed, param_index, probe, 0, n)
        for seed, param_index, probe in [(1, 0, 0), (2, 0, 0), (1 + 2**32, 0, 0), (1, 1, 0), (1, 0, 1)]
    ]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(float((a * b).mean())) < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_probes", [0, 1, 2, 17])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_update_is_the_sequence_of_single_roundings(
    kernels: str, kind: NoiseKind, n_probes: int, decay: float
) -> None:
    start, n = 3001, 70_001
    theta = random_values(n).view(-1, 1)
    probes = [Probe(SEED + 2**63 * (i % 2), i, to_float32((-1) ** i / (3 + i))) for i in range(n_probes)]
    expected = theta.view(-1) * ones(n).mul_(decay) if decay != 1.0 else theta.view(-1)
    acc = None
    for p in probes:
        term = noise(kind, p.seed, 4, p.probe, start, start + n) * torch.tensor(p.coefficient)
        acc = term if acc is None else acc + term
    if acc is not None:
        expected = expected - acc
    updated = theta.clone()
    update_(updated, probes, kind, 4, start, decay)
    assert torch.equal(updated.view(-1).view(torch.int32), expected.view(torch.int32))
    if n_probes == 17 and decay != 1.0:  # this data would show a fused multiply-add
        fused = (theta.view(-1).double() * to_float32(decay) - acc.double()).float()
        assert not torch.equal(fused, expected)


def some_updates(n_probes: list[int], decays: list[float]) -> list[Update]:
    """Coefficients of either sign, among them both zeros."""
    updates = []
    for i, (n, decay) in enumerate(zip(n_probes, decays, strict=True)):
        coefficients = [to_float32((-1) ** (i + j) * (j % 4) / (3 + i + j)) for j in range(n)]
        probes = [Probe(SEED * (i + 1) & 2**64 - 1, j, c) for j, c in enumerate(coefficients)]
        updates.append(Update.of(probes, decay))
    return updates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("start", "n"), [(0, 1), (4095, 2), (3001, 70_001), (8192, 4096), (2**45 + 77, 5000)]
)
@pytest.mark.parametrize(
    ("n_probes", "decays"),
    [
        ([2, 1, 5], [1.0, 1.0, 1.0]),
        ([1, 3, 1, 9], [0.9, 0.99, 1.0, 0.5]),
        ([0, 2, 0, 0, 1, 0], [0.9, 1.0, 1.0, 0.7, 0.99, 0.8]),
    ],
)
def test_many_updates_are_one_after_the_other(
    kernels: str,
    kind: NoiseKind,
    start: int,
    n: int,
    n_probes: list[int],
    decays: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theta, updates = random_values(n), some_updates(n_probes, decays)
    fused, backwards, one_by_one = theta.clone(), theta.clone(), theta.clone()
    update_all_(fused, updates, kind, 4, start)
    update_all_(backwards, updates[::-1], kind, 4, start)
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    for u in updates:
        terms = zip(u.seeds.tolist(), u.numbers.tolist(), u.coefficients.tolist(), strict=True)
        update_(one_by_one, [Probe(*term) for term in terms], kind, 4, start, u.decay)
    assert torch.equal(fused.view(torch.int32), one_by_one.view(torch.int32))
    if n > 1000:  # this data would show another order
        assert not torch.equal(fused, backwards)


@pytest.mark.parametrize("kind", KINDS)
def test_many_updates_into_another_tensor(kernels: str, kind: NoiseKind) -> None:
    """`theta` is read and not written to."""
    theta, updates = random_values(9001), some_updates([2, 0, 3], [0.9, 0.7, 1.0])
    before, expected, out = theta.clone(), theta.clone(), torch.full_like(theta, torch.nan)
    combine(out, theta, updates, Where.of(kind, 4, 123))
    update_all_(expected, updates, kind, 4, 123)
    assert torch.equal(out, expected)
    assert torch.equal(theta, before)


def test_threads_do_not_change_many_updates(kernels: str) -> None:
    """A few blocks are shared out when there are many probes."""
    theta, updates = random_values(40_001), some_updates([30, 7, 40], [1.0, 0.9, 0.99])
    torch_threads = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(theta.clone())
            update_all_(results[-1], updates, "sign", 4, 123)
    finally:
        torch.set_num_threads(torch_threads)
    assert all(torch.equal(r, results[0]) for r in results)
    assert not torch.equal(theta, results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_updated_as_one_by_one(kernels: str, kind: NoiseKind) -> None:
    """Small ones, empty ones, shards, one that is large, and one in bfloat16."""
    updates = [Update.of([Probe(3, 0, 0.25), Probe(2**63, 5, -1e-3)], 0.875), Update.of([Probe(9, 1, 1.5)])]
    sizes = {(5, 0): 3, (0, 0): 1, (4096, 8): 7, (10_001, 4095): 2, ((1 << 18) + 1, 2**32 - 3): 9}
    pieces = [Piece(noise("gauss", 1, i, 0, 0, n), i, start) for (n, start), i in sizes.items()]
    pieces.append(Piece(noise("gauss", 1, 4, 0, 0, 777).bfloat16(), 4, 12))
    expected = [p.theta.float() for p in pieces]
    for x, p in zip(expected, pieces, strict=True):
        update_all_(x, updates, kind, p.param_index, p.start)
    update_pieces_(pieces, updates, kind, round_seed=11)
    for x, p in zip(expected[:-1], pieces, strict=False):
        assert torch.equal(p.theta.view(torch.int32), x.view(torch.int32))
    rounded = torch.empty(777, dtype=torch.bfloat16)
    round_to_bfloat16(expected[-1], rounded, 11, 4, 12)
    assert torch.equal(pieces[-1].theta, rounded)


def test_no_updates_change_nothing(kernels: str) -> None:
    theta = random_values(100)
    before = theta.clone()
    update_all_(theta, [], "sign", 0)
    assert torch.equal(theta, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4097), (2, 3, 5, 7)])
def test_perturb(kernels: str, kind: NoiseKind, shape: tuple[int, ...]) -> None:
    n = int(np.prod(shape))
    theta = random_values(n).view(shape)
    before = theta.clone()
    moved = perturb(theta, 1e-3, kind, SEED, 9, 3, start=4000)
    z = noise(kind, SEED, 9, 3, 4000, 4000 + n).view(shape)
    assert torch.equal(moved, theta + z * torch.tensor(1e-3))
    assert torch.equal(theta, before)
    assert moved.data_ptr() != theta.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_get_what_the_whole_gets(kernels: str, kind: NoiseKind) -> None:
    theta = random_values(50_000)
    probes = [Probe(SEED, i, 0.25 + i) for i in range(3)]
    whole = theta.clone()
    update_(whole, probes, kind, 1, 0, 0.99)
    for a, b in [(0, 12_345), (12_345, 12_346), (12_346, 50_000)]:
        shard = theta[a:b].clone()
        update_(shard, probes, kind, 1, a, 0.99)
        assert torch.equal(shard, whole[a:b])


def test_threads_at_once(kernels: str) -> None:
    """Peers of a test are threads of one process: each gets its own bits."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        theta = random_values(1 << 19)

        def peer(i: int) -> torch.Tensor:
            mine = theta.clone()
            for step in range(3):
                update_(mine, [Probe(i, step, 0.5), Probe(i, step + 9, 0.25)], "sign", 0)
            return mine

        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(peer, range(6)))
        torch.set_num_threads(1)
        assert all(torch.equal(peer(i), together[i]) for i in range(6))
    finally:
        torch.set_num_threads(torch_threads)


def test_parameters_that_require_gradients(kernels: str) -> None:
    p = torch.nn.Parameter(ones(10))
    moved = perturb(p, 0.5, "sign", 1, 0, 0)
    assert not moved.requires_grad
    update_(p, [Probe(1, 0, -0.5)], "sign", 0)
    assert torch.equal(p.detach(), moved)


def test_uniform_words() -> None:
    words = uniform_words(SEED, Purpose.CODE, 6, 11)
    assert words.dtype == np.uint32
    assert words.tolist() == [philox_by_hand([i // 4, 0, 6, 2 << 20], SEED)[i % 4] for i in range(11)]
    assert uniform_words(SEED, Purpose.CODE, 6, 3).tolist() == words[:3].tolist()
    assert uniform_words(SEED, Purpose.ROUND, 6, 11).tolist() != words.tolist()
    assert len(uniform_words(SEED, Purpose.CODE, 6, 0)) == 0


def test_initial_values(kernels: str) -> None:
    x = initial_values(SEED, 3, 0, 20_000, 0.02)
    assert abs(float(x.std()) - 0.02) < 0.001
    assert torch.equal(x[5000:6000], initial_values(SEED, 3, 5000, 6000, 0.02))
    assert not torch.equal(x, noise("gauss", SEED, 3, 0, 0, 20_000) * torch.tensor(0.02))
    assert torch.equal(initial_values(SEED, 3, 0, 5, 0.0), torch.zeros(5))


def test_refuses_what_it_cannot_do() -> None:
    for theta in (torch.zeros(4, 4).T[:2], torch.zeros(4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="contiguous float32"):
            update_(theta, [Probe(1, 0, 1.0)], "sign", 0)
    for probe in (2**20, -1):
        with pytest.raises(ValueError, match=f"probe {probe} is not in"):
            update_(ones(3), [Probe(1, probe, 1.0)], "sign", 0)


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINWIRE_KERNELS", "cuda")
    with pytest.raises(ValueError, match="THINWIRE_KERNELS='cuda'"):
        noise("sign", 1, 0, 0, 0, 1)


def test_without_numba_the_torch_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINWIRE_KERNELS", "auto")
    expected = noise("sign", SEED, 0, 0, 0, 100)
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "thinwire.compression.cpu.noise_cpu", None)
    monkeypatch.delattr("thinwire.compression.cpu.noise_cpu", raising=False)
    is_installed.cache_clear()
    try:
        assert torch.equal(noise("sign", SEED, 0, 0, 0, 100), expected)
        monkeypatch.setenv("THINWIRE_KERNELS", "numba")
        with pytest.raises(ImportError):
            noise("sign", SEED, 0, 0, 0, 100)
    finally:
        is_installed.cache_clear()


def test_any_processor_looks_up_the_same() -> None:
    """Two at a time as 64 at a time, of the third probe."""
    pytest.importorskip("numba")
    from thinwire.compression.cpu import addresses_cpu, noise_cpu

    if not addresses_cpu.has_look_up():
        pytest.skip("this processor has no AVX-512 VBMI: two at a time are all there is")
    table = np.array(NORMAL_256, dtype=np.float32)
    coefficients = np.array([1.0, 0.5, 0.37], dtype=np.float32)
    words = np.random.default_rng(1).integers(0, 2**32, 1024, dtype=np.uint32)
    found, expected = np.zeros((2, 4096), dtype=np.float32)
    noise_cpu._look_up_vectors(found, words, noise_cpu._tables_of_bytes(table, coefficients), 2)
    noise_cpu._look_up_pairs(expected, words, noise_cpu._tables_of_values(table, coefficients), 2)
    assert found.tobytes() == expected.tobytes()
    octets = words.view(np.uint8).reshape(1024, 4)
    assert np.array_equal(found.reshape(4, 1024).T, (table * coefficients[2])[octets])


def test_importing_noise_does_not_load_numba() -> None:
    code = "import sys, thinwire.compression.numerics.noise; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
