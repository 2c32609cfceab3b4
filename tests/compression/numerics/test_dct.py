"""The integer transform and its use in dct_topk, against oracles in Python and float64."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from blake3 import blake3

from thinwire.compression.base import Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.sparse import largest
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.numerics import dct
from thinwire.compression.numerics.bits import pack_bits
from thinwire.compression.numerics.noise import noise, uniform_words
from thinwire.compression.numerics.noise_layout import Purpose

CPU = torch.device("cpu")
TURN = Turn(round=1, shared_seed=2, own_seed=3, lr_factor=1.0)


def inverse_by_hand(coefficients: np.ndarray) -> np.ndarray:
    """One group at a time with Python's exact scaling and int64 products."""
    basis = dct.integer_basis(CPU).numpy().astype(np.int64)
    out = np.zeros_like(coefficients)
    for g, row in enumerate(coefficients):
        exponent = math.frexp(float(np.abs(row).max()))[1] - 1
        if np.abs(row).max() < 2.0**-100:
            continue
        integers = np.array([round(math.ldexp(float(c), 9 - exponent)) for c in row], dtype=np.int64)
        assert np.abs(integers).max() <= 1024
        x = (integers.reshape(-1, 64) @ basis).reshape(-1)
        assert np.abs(x).max() < 2**24
        scaled = (x * 2.0 ** (exponent - 9)).astype(np.float32)
        out[g] = scaled * np.float32(dct.INVERSE_SCALE)
    return out + np.float32(0)


def test_basis() -> None:
    basis = dct.integer_basis(CPU)
    assert blake3(basis.numpy().astype("<i4").tobytes()).hexdigest(8) == "2d0d423a83ef3127"
    assert torch.equal(basis, torch.round(dct.real_basis(CPU).double() * 127 * math.sqrt(32)).float())
    assert float(basis.abs().max()) == 127
    assert np.float32(math.sqrt(1 / 32) / 127) == dct.INVERSE_SCALE


def test_forward_is_orthonormal() -> None:
    x = noise("gauss", 1, 0, 0, 0, 640).view(2, 320)
    c = dct.forward(x)
    assert torch.allclose(c.norm(), x.norm())
    back = (c.view(-1, 64) @ dct.real_basis(CPU)).view(2, 320)
    assert torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("exponent", [-148, -110, -100, -99, -30, 0, 31, 97])
def test_inverse_is_the_integer_product(exponent: int) -> None:
    c = noise("gauss", 5, 0, 0, 0, 12 * 192).view(12, 192)
    c[:, ::3] = 0
    c[1] = 0
    c[2] = c[2].abs().clamp(max=1.5).fill_(1.0)  # the largest sums: all coefficients at the limit
    c[3] = 1.9999999
    c[4, 1:] = 0
    c = (c.double() * 2.0**exponent).float()
    with exact_arithmetic():
        x = dct.inverse_exact(c)
    assert np.array_equal(x.numpy().view(np.int32), inverse_by_hand(c.numpy()).view(np.int32))


def test_inverse_is_close_to_the_real_one() -> None:
    c = noise("gauss", 6, 0, 0, 0, 64 * 4096).view(64, 4096)
    with exact_arithmetic():
        x = dct.inverse_exact(c)
    real = (c.view(-1, 64).double() @ dct.real_basis(CPU).double()).view(c.shape)
    assert float((x - real).norm() / real.norm()) < 0.004
    assert float((x.sign() == real.sign()).double().mean()) > 0.998


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_the_callers_settings_do_not_matter(precision: str) -> None:
    """Low matmul precision, autocast and gradients of a training loop stay outside."""
    compressor, part = DctTopK(), Part.whole((100, 100))
    packed = compressor.pack(noise("gauss", 7, 0, 0, 0, 10_000), part, TURN)
    expected = compressor.decode([packed], [1.0], part, TURN)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(compressor.decode([packed], [1.0], part, TURN), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_largest_takes_the_lower_index_of_equals() -> None:
    values = torch.tensor([[1.0, -3, 3, 0, 3, 2], [0, 0, 0, 0, 0, -1], [5, 5, 5, 5, 5, 5]])
    index, kept = largest(values, 2)
    assert index.tolist() == [[1, 2], [0, 5], [0, 1]]
    assert kept.tolist() == [[-3, 3], [0, -1], [5, 5]]


def made_pack(compressor: DctTopK, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A valid pack drawn from exact noise, with a zero group: the same on every machine."""
    scales, codes = [], []
    for g, first in enumerate(range(0, n, compressor.group_size)):
        length = min(compressor.group_size, n - first)
        if g == 1:
            scales.append(0.0)
            continue
        k, limit = -(-compressor.k * length // compressor.group_size), -(-length // 64) * 64
        words = uniform_words(seed, Purpose.DATA, g, limit + k).astype(np.int64)
        index = np.sort(np.argsort(words[:limit], kind="stable")[:k])
        value = words[limit:] & 1 if compressor.bits == 1 else np.maximum(words[limit:] % 256, 129) % 256
        scales.append(float(words[0] % 256 + 1) * 2.0 ** (g % 5 - 20))
        codes += [int(i | v << compressor.pack_layout.index_bits) for i, v in zip(index, value, strict=True)]
    return (
        torch.tensor(scales, dtype=torch.bfloat16),
        pack_bits(torch.tensor(codes, dtype=torch.int64), compressor.pack_layout.indices.width),
    )


def decode_by_hand(
    compressor: DctTopK, packs: list[tuple[torch.Tensor, ...]], weights: list[float], n: int
) -> np.ndarray:
    """Bit by bit and coefficient by coefficient, from the docstring."""
    n_groups = -(-n // compressor.group_size)
    mean = np.zeros((n_groups, compressor.group_size), dtype=np.float32)
    for (scales, codes), w in zip(packs, weights, strict=True):
        bits = int.from_bytes(bytes(codes.tolist()), "little")
        for g in range(n_groups):
            scale = float(scales[g])
            length = min(compressor.group_size, n - g * compressor.group_size)
            for _ in range(-(-compressor.k * length // compressor.group_size) if scale else 0):
                code, bits = (
                    bits % 2**compressor.pack_layout.indices.width,
                    bits >> compressor.pack_layout.indices.width,
                )
                index, raw = (
                    code % 2**compressor.pack_layout.index_bits,
                    code >> compressor.pack_layout.index_bits,
                )
                q = (1 - 2 * raw) if compressor.bits == 1 else raw - 256 * (raw > 127)
                mean[g, index] += np.float32(w) * np.float32(q * scale)
        assert bits == 0
    mean *= np.float32(1 / sum(weights))
    return inverse_by_hand(mean).reshape(-1)[:n]


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.0, 3.0, 0.3], [2.0**20, 7.0, 1.0]])
def test_decode_is_what_the_docstring_says(bits: int, weights: list[float]) -> None:
    for compressor, n in [(DctTopK(bits=bits), 9000), (DctTopK(k=5, group_size=192, bits=bits), 1000)]:
        packs = [made_pack(compressor, n, seed) for seed in range(len(weights))]
        part = Part.whole((n,))
        for p in packs:
            compressor.check(p, part, TURN)
        x = compressor.decode(packs, weights, part, TURN)
        assert np.array_equal(x.numpy(), decode_by_hand(compressor, list(packs), weights, n))


def test_committed_decodings(golden: Callable[[dict[str, str]], None]) -> None:
    out = {}
    for compressor in (DctTopK(), DctTopK(bits=8), DctTopK(k=3, group_size=128)):
        packs = [made_pack(compressor, 50_000, seed) for seed in range(3)]
        x = compressor.decode(packs, [1.0, 2.0, 0.7], Part.whole((50_000,)), TURN)
        name = f"DctTopK(k={compressor.k}, group_size={compressor.group_size}, bits={compressor.bits})"
        out[name] = blake3(x.numpy().astype("<f4").tobytes()).digest(16).hex()
    golden(out)


def test_sums_do_not_overflow_at_the_limits() -> None:
    """Largest scales, weights and values, summed over many shares: finite."""
    compressor, part = DctTopK(k=64, group_size=64, bits=8), Part.whole((64,))
    scale = torch.tensor([2.0**60]).sub_(2.0**52).to(torch.bfloat16)
    packed = (scale, pack_bits(torch.arange(64) | 127 << 6, compressor.pack_layout.indices.width))
    compressor.check(packed, part, TURN)
    x = compressor.decode([packed] * 1024, [2.0**40] * 1024, part, TURN)
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) > 2.0**60


def test_energy_kept_of_a_random_momentum() -> None:
    """About 6.9% with k = 32 of 4096, and 1 bit is nearly as good as 8."""
    x = noise("gauss", 8, 0, 0, 0, 1 << 20)
    part = Part.whole((1 << 20,))
    kept = []
    for bits in (1, 8):
        compressor = DctTopK(bits=bits)
        left = x - compressor.decode([compressor.pack(x, part, TURN)], [1.0], part, TURN)
        kept.append(1 - float((left.norm() / x.norm()) ** 2))
    assert 0.066 < kept[0] < kept[1] < 0.072


def test_refusals() -> None:
    for wrong in (
        {"bits": 3},
        {"bits": 32},
        {"bits": True},
        {"group_size": 0},
        {"group_size": 1 << 17},
        {"k": 0},
        {"k": 5000},
        {"indices": "golomb"},
        {"layout": "tile"},
        {"group_size": 128, "layout": "tiles"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DctTopK(**wrong)
    compressor, part = DctTopK(), Part((5, 5), 0, 10)
    with pytest.raises(ValueError, match="whole parameters only"):
        compressor.pack(torch.zeros(10), part, TURN)
    for bad in (float("nan"), float("inf"), 2.0**63):
        x = torch.ones(25)
        x[3] = bad
        with pytest.raises(ValueError, match="not finite"):
            compressor.pack(x, Part.whole((5, 5)), TURN)


def test_one_thread_that_is_done_does_not_lower_the_precision_of_another() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact_arithmetic():
            inside.set()
            assert leave.wait(10)

    thread = threading.Thread(target=other)
    try:
        with exact_arithmetic():
            thread.start()
            assert inside.wait(10)
        assert torch.get_float32_matmul_precision() == "highest", "the other thread is still at work"
        leave.set()
        thread.join(10)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        leave.set()
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["cuda", "mkldnn"])
def test_a_precision_set_by_its_new_name_is_put_back(name: str) -> None:
    """After a mix of old and new names torch refuses to read the old one."""
    matmul = getattr(torch.backends, name).matmul
    before, legacy = matmul.fp32_precision, torch.get_float32_matmul_precision()
    try:
        matmul.fp32_precision = "tf32"
        with exact_arithmetic():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(legacy)
        matmul.fp32_precision = before
