"""The compiled paths of rows of values (`dense`, `slicing` and the like): bytes and bits of the reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from thinwire.compression.base import Packed, Part, Turn
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.dense_codec import GroupedCodec
from thinwire.compression.codecs.random_k import RandomK
from thinwire.compression.codecs.slicing import Slicing
from thinwire.compression.errors import BadPayload
from thinwire.compression.exact import to_float32
from thinwire.compression.numerics.noise import noise
from thinwire.compression.numerics.reduce import l1_norm
from thinwire.compression.numerics.value_formats import FORMATS

pytest.importorskip("numba", reason="the numba kernels are an extra")
from thinwire.optim.parts.outer_cpu import outer_step

Compressor = Dense | Slicing | RandomK


def drawn_compressor(rng: random.Random, bits: int | str) -> Compressor:
    options: dict[str, Any] = {"bits": bits, "group_size": rng.choice([8, 16, 24, 64, 1000, 1024])}
    if rng.random() < 0.6:
        return Dense(**options)
    return rng.choice([Slicing, RandomK])(rate=rng.choice([1.0, 0.3, 1 / 7]), **options)


def drawn_values(rng: random.Random, n: int, group_size: int) -> torch.Tensor:
    """Some groups are zero, some tiny; values that lie in the middle of two codes; denormals, -0."""
    x = noise("gauss", rng.getrandbits(60), 0, 0, 0, n) * 2.0 ** rng.choice([0, 0, -10, -126, -140, 50])
    for _ in range(rng.randrange(3)):
        first = rng.randrange(n) // group_size * group_size
        x[first : first + rng.choice([1, 3]) * group_size] *= rng.choice([0.0, -0.0, 2.0**-20, 2.0**-149])
    if rng.random() < 0.3:
        x = (x / x.abs().amax().clamp(min=2.0**-120) * 14).round() / 2  # halves
    if rng.random() < 0.2:
        x = x.sign() * 2.0 ** torch.arange(n).remainder(9)
    return x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy().tobytes()


def bits_of(packed: Packed) -> list[list[int]]:
    return [t.view(torch.int16 if t.dtype == torch.bfloat16 else t.dtype).tolist() for t in packed]


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("seed", range(20))
def test_bytes_and_bits_of_the_reference(bits: int | str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs, their check, means of any shard with any weights, and norms."""
    rng = random.Random(f"{bits} {seed}")
    compressor = drawn_compressor(rng, bits)
    n = rng.choice([1, 7, 8, 63, 1024, 1025, 4096, 7919, rng.randint(1, 300_000)])
    whole = Part.whole((n,))
    turn = Turn(round=rng.randint(1, 20), shared_seed=8, own_seed=9, lr_factor=1.0)
    values = [drawn_values(rng, n, compressor.group_size) for _ in range(rng.choice([1, 2, 5]))]
    weights = [rng.choice([1.0, 0.0, 2.5, 1e6, 1e-3]) for _ in values]
    start = rng.randrange(n)
    parts = whole, Part(whole.shape, start, rng.randint(start, n))
    found: dict[str, list[Any]] = {}
    for kernels in ("torch", "numba"):
        monkeypatch.setenv("THINWIRE_KERNELS", kernels)
        packs = [compressor.pack(x, whole, turn) for x in values]
        for packed in packs:
            compressor.check(packed, whole, turn)
        found[kernels] = [
            [bits_of(packed) for packed in packs],
            [compressor.decode(packs, weights, p, turn).view(torch.int32).tolist() for p in parts],
            [compressor.magnitude(packed, whole, turn) for packed in packs],
        ]
    for plain, compiled in zip(found["torch"], found["numba"], strict=True):
        assert plain == compiled


@pytest.mark.parametrize("bits", FORMATS)
def test_any_number_of_threads(bits: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that are zero leave no gaps, whichever thread had them."""
    monkeypatch.setenv("THINWIRE_KERNELS", "numba")
    x = noise("gauss", 3, 0, 0, 0, 500_001)
    x[100_000:200_000] = 0
    x[450_000:] = 0
    compressor, part, turn = Dense(bits=bits), Part.whole((500_001,)), Turn(1, 1, 1, 1.0)  # type: ignore[arg-type]
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            packed = compressor.pack(x, part, turn)
            compressor.check(packed, part, turn)
            found.append((*packed, compressor.decode([packed] * 2, [1.0, 2.0], part, turn)))
    finally:
        torch.set_num_threads(before)
    assert all(same(a, b) for row in found[1:] for a, b in zip(row[1:], found[0][1:], strict=True))


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 2.0**59])
def test_values_that_cannot_be_sent(bits: int | str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise("gauss", 3, 0, 0, 0, 9000)
    x[8999] = value
    for kernels in ("torch", "numba"):
        monkeypatch.setenv("THINWIRE_KERNELS", kernels)
        with pytest.raises(ValueError, match="not finite, or not below"):
            Dense(bits=bits).pack(x, Part.whole((9000,)), Turn(1, 1, 1, 1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (8, 128), ("e3m0", 8), (16, 0x8000), (16, 0x4001)])
def test_codes_without_a_value_are_refused(bits: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise("gauss", 3, 0, 0, 0, 1001)
    codec = Dense(bits=bits)._window().codec
    assert isinstance(codec, GroupedCodec)
    for kernels in ("torch", "numba"):
        monkeypatch.setenv("THINWIRE_KERNELS", kernels)
        scales, codes = codec.pack([x])
        codec.check((scales, codes), 1001)
        wrong = codes.clone()
        wrong[300] = code & 255 if bits not in {4, "e3m0"} else code << 4 | 1
        if bits == 16:
            wrong[301] = code >> 8
        with pytest.raises(BadPayload, match=r"code|float16"):
            codec.check((scales, wrong), 1001)


@pytest.mark.parametrize("n", [1, 5, 4096, 3_000_001])
def test_norms(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise("gauss", n, 0, 0, 0, n) * 2.0 ** (torch.arange(n) % 40)
    found = []
    for kernels in ("torch", "numba"):
        monkeypatch.setenv("THINWIRE_KERNELS", kernels)
        found.append([l1_norm(v) for v in (x, x[::2], x * 2.0**-149, x * 0, x.double())])
    assert found[0] == found[1]


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_outer_step_of_diloco(nesterov: bool) -> None:
    """One rounding per operation: a fused multiply-add would differ."""
    theta, momentum, step = (noise("gauss", 5, i, 0, 0, 200_003) for i in range(3))
    mu, lr = to_float32(0.9), to_float32(0.7)
    expected_momentum = momentum * mu + step
    moved = step + expected_momentum * mu if nesterov else expected_momentum
    expected = theta - moved * lr
    outer_step(theta, momentum, step, mu, lr, nesterov)
    assert same(momentum, expected_momentum)
    assert same(theta, expected)
