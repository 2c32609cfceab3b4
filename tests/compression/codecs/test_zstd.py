"""Dense payloads squeezed by zstandard: the same values in fewer bytes, and nothing else that is a frame."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import torch
import zstandard

from thinwire.compression.base import Packed, Part, Turn
from thinwire.compression.codecs import zstd
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.errors import BadPayload, ConfigError
from thinwire.compression.numerics.noise import noise
from thinwire.compression.registry import build_compressor

TURN = Turn(round=1, shared_seed=8, own_seed=9, lr_factor=1.0)
BITS = [1, 2, 4, 8, 16, "e3m0", 32]


def momentum_like(part: Part, seed: int = 1) -> torch.Tensor:
    """Heavy tails: a few values are much larger than the others."""
    x = noise("gauss", seed, 0, 0, 0, part.n_global)
    return x * x * x


def n_bytes_of(packed: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (3,), (7919,), (300, 500)], ids=str)
def test_the_values_are_the_same_and_never_more_bytes(bits: int | str, shape: tuple[int, ...]) -> None:
    plain, squeezed = (Dense(bits=bits, zstd=zstd) for zstd in (False, True))  # type: ignore[arg-type]
    part = Part.whole(shape)
    parts = [part, Part(shape, 0, part.n_global // 3), Part(shape, part.n_global // 3, part.n_global)]
    a, b = ([c.pack(momentum_like(part, seed), part, TURN) for seed in (1, 2)] for c in (plain, squeezed))
    for x, y in zip(a, b, strict=True):
        squeezed.check(y, part, TURN)
        assert n_bytes_of(y) <= n_bytes_of(x)
        assert squeezed.magnitude(y, part, TURN) == plain.magnitude(x, part, TURN)
    for p in parts:
        mean, same = plain.decode(a, [1.0, 3.0], p, TURN), squeezed.decode(b, [1.0, 3.0], p, TURN)
        assert torch.equal(mean.view(torch.int32), same.view(torch.int32))


@pytest.mark.parametrize(("bits", "saved"), [(2, 0.05), (4, 0.3), (8, 0.15), ("e3m0", 0.05), (32, 0.05)])
def test_fewer_bytes_where_codes_are_not_equally_frequent(bits: int | str, saved: float) -> None:
    part = Part.whole((300, 500))
    plain, squeezed = (
        Dense(bits=bits, zstd=zstd).pack(momentum_like(part), part, TURN)  # type: ignore[arg-type]
        for zstd in (False, True)
    )
    assert n_bytes_of(squeezed) < (1 - saved) * n_bytes_of(plain)


def frame_of(data: bytes, level: int = 3, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level=level, **options).compress(data)  # type: ignore[arg-type]


N_BYTES = 5000  # of 10000 values of 4 bits
GOOD = bytes(N_BYTES)


def lying(data: bytes) -> bytes:
    """A frame whose header states N_BYTES, whatever it holds."""
    frame = frame_of(data)
    stated = struct.pack("<H", len(data) - 256)
    assert frame.count(stated) == 1
    return frame.replace(stated, struct.pack("<H", N_BYTES - 256))


BAD: dict[str, Callable[[], bytes]] = {
    "no frame": lambda: b"rubbish" * 10,
    "nothing": lambda: b"",
    "half a header": lambda: frame_of(GOOD)[:5],
    "a frame without its end": lambda: frame_of(GOOD)[:-1],
    "a frame and more": lambda: frame_of(GOOD) + b"x",
    "two frames": lambda: frame_of(GOOD[:1000]) + frame_of(GOOD[1000:]),
    "a frame before the frame": lambda: struct.pack("<II", 0x184D2A50, 4) + b"skip" + frame_of(GOOD),
    "a frame that is skipped": lambda: struct.pack("<II", 0x184D2A50, N_BYTES),
    "a frame that states no length": lambda: frame_of(GOOD, write_content_size=False),
    "a bomb": lambda: frame_of(bytes(1 << 26)),
    "a bomb that states no length": lambda: frame_of(bytes(1 << 26), write_content_size=False),
    "a byte less": lambda: frame_of(GOOD[1:]),
    "a byte more": lambda: frame_of(GOOD + b"x"),
    "less than it states": lambda: lying(bytes(4000)),
    "more than it states": lambda: lying(bytes(6000)),
    "nothing at all in it": lambda: frame_of(b""),
    "changed bytes": lambda: frame_of(bytes(range(250)) * 20)[:-3] + b"abc",
}


@pytest.mark.parametrize("what", BAD)
def test_other_frames_are_bad_payloads(what: str) -> None:
    compressor, part = Dense(bits=4, zstd=True), Part.whole((10_000,))
    scales = torch.ones(10, dtype=torch.bfloat16)
    data = BAD[what]()
    assert len(data) < N_BYTES, "as long as the tensor itself: no frame"
    with pytest.raises(BadPayload) as e:
        compressor.check((scales, torch.tensor(list(data), dtype=torch.uint8)), part, TURN)
    assert e.value.reason == "zstd"


@pytest.mark.parametrize(
    "frame",
    [frame_of(GOOD), frame_of(GOOD, level=19), frame_of(GOOD, write_checksum=True), frame_of(GOOD, level=-5)],
)
def test_frames_of_any_level_are_good(frame: bytes) -> None:
    compressor, part = Dense(bits=4, zstd=True), Part.whole((10_000,))
    packed = (torch.ones(10, dtype=torch.bfloat16), torch.tensor(list(frame), dtype=torch.uint8))
    compressor.check(packed, part, TURN)
    plain = (packed[0], torch.zeros(N_BYTES, dtype=torch.uint8))
    expected = Dense(bits=4).decode([plain], [1.0], part, TURN)
    assert torch.equal(compressor.decode([packed], [1.0], part, TURN), expected)


def test_what_is_in_a_frame_is_checked_as_ever() -> None:
    part = Part.whole((10_000,))
    values = torch.full((10_000,), float("nan"))
    frame = frame_of(values.numpy().tobytes())
    with pytest.raises(BadPayload) as e:
        Dense(zstd=True).check((torch.tensor(list(frame), dtype=torch.uint8),), part, TURN)
    assert e.value.reason == "nan"


def test_it_is_an_option_of_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"name": "dense", "bits": 4, "zstd": True}
    assert build_compressor(config) == Dense(bits=4, zstd=True)
    assert repr(Dense()) == "Dense(bits=32, group_size=1024)"
    assert repr(Dense(zstd=True)) == "Dense(bits=32, group_size=1024, zstd=True)"
    with pytest.raises(ConfigError, match="zstd 'yes': true or false"):
        build_compressor({**config, "zstd": "yes"})
    monkeypatch.setattr(zstd, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"needs the package zstandard: pip install 'thinwire\[zstd\]'"):
        build_compressor(config)
