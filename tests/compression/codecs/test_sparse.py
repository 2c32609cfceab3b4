"""What the compressors share that send the largest coefficients: hostile codes, and the bytes of a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from thinwire.compression import wire
from thinwire.compression.base import Packed, Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.errors import BadPayload
from thinwire.compression.numerics.noise import noise

TURN = Turn(round=7, shared_seed=8, own_seed=9, lr_factor=1.0)


def drawn(part: Part, seed: int = 1) -> torch.Tensor:
    return noise("gauss", seed, 0, 0, 0, part.n_global)


def survives(compressor: Sparse, packed: Packed, part: Part) -> str | None:
    """The reason of BadPayload, or None."""
    try:
        compressor.check(packed, part, TURN)
    except BadPayload as e:
        return e.reason
    return None


PACKED: list[Sparse] = [
    DctTopK(),
    DctTopK(bits=8),
    DctTopK(k=5, group_size=192),
    DctTopK(k=128, group_size=128, bits=8),
    TopK(indices="packed", bits=4),
    TopK(k=3, group_size=100, indices="packed", bits=8),
]


@pytest.mark.parametrize("compressor", PACKED, ids=str)
def test_codes_that_are_refused(compressor: Sparse) -> None:
    n = compressor.group_size + 70  # the second group is short: 128 coefficients
    part = Part.whole((n,))
    scales, codes = compressor.pack(drawn(part), part, TURN)
    n_codes = compressor.k + -(-compressor.k * 70 // compressor.group_size)
    number = int.from_bytes(bytes(codes.tolist()), "little")
    width, index_mask = compressor.pack_layout.indices.width, 2**compressor.pack_layout.index_bits - 1

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
        values[0] = values[0] & index_mask | 128 << compressor.pack_layout.index_bits

    assert survives(compressor, with_codes(lambda values: None), part) is None
    assert survives(compressor, with_codes(swap), part) == "index"
    assert survives(compressor, with_codes(repeat), part) == "index"
    if compressor.group_size > 128 or isinstance(compressor, TopK):
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
