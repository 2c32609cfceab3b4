"""How many bytes the docstrings of compressors promise, counted from the shapes, one group at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from thinwire.compression.base import Compressor, Packed, Part
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.selection import Selection
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.striding import Striding
from thinwire.compression.codecs.tiles import Tiles
from thinwire.compression.numerics.index_layout import PackedIndices, RiceIndices

WIDTHS = (1, 2, 4, 8, 16, "e3m0")
"""`bits` of every compressor; those without indices know 32, too."""


def small_compressors() -> list[dict[str, Any]]:
    """Every compressor as a config, with every way to write values and indices, and small groups."""
    return list(_small_compressors())


def _small_compressors() -> Iterator[dict[str, Any]]:
    for bits in WIDTHS:
        for indices in ("packed", "rice"):
            sparse = {"bits": bits, "indices": indices}
            yield {"name": "dct_topk", "layout": "flat", "k": 7, "group_size": 128, **sparse}
            yield {"name": "dct_topk", "layout": "tiles", "k": 5, "group_size": 64, **sparse}
            yield {"name": "topk", "k": 9, "group_size": 100, **sparse}
    for bits in (*WIDTHS, 32):
        for name in ("random_k", "striding", "slicing"):
            yield {"name": name, "rate": 0.3, "bits": bits, "group_size": 24}
        for zstd in (False, True):
            yield {"name": "dense", "bits": bits, "group_size": 24, "zstd": zstd}


def name_of(config: dict[str, Any]) -> str:
    """For the names of tests."""
    return " ".join(
        str(v) for k, v in config.items() if k in ("name", "layout", "indices", "bits") or v is True
    )


def n_bytes_of(packed: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in packed)


def value_bits(compressor: Compressor) -> int:
    bits = compressor.bits  # type: ignore[attr-defined]
    return 4 if bits == "e3m0" else int(bits)


def group_lengths(compressor: Sparse, shape: tuple[int, ...]) -> list[int]:
    """Elements of each group, counted one by one."""
    n, size = Part.whole(shape).n_global, compressor.group_size
    group = torch.arange(n) // size
    if isinstance(tiles := compressor.pack_layout.groups(shape), Tiles):
        row, column = torch.arange(n) // tiles.columns, torch.arange(n) % tiles.columns
        group = row // tiles.side * -(-tiles.columns // tiles.side) + column // tiles.side
    return group.bincount().tolist() if n else []


def expected_bytes(compressor: Compressor, packed: Packed, part: Part) -> int:
    """For groups that have values other than zero; with zstd the most."""
    n, width = part.n_global, value_bits(compressor)
    if isinstance(compressor, Dense | Selection):
        m = n
        if isinstance(compressor, Striding):
            m = len(range(0, n, -(-compressor.share.denominator // compressor.share.numerator)))
        elif isinstance(compressor, Selection):
            m = -(-n * compressor.share.numerator // compressor.share.denominator)
        return 4 * m if width == 32 else 2 * -(-m // compressor.group_size) + -(-m * width // 8)
    assert isinstance(compressor, Sparse)
    lengths = group_lengths(compressor, part.shape)
    sent = [-(-compressor.k * length // compressor.group_size) for length in lengths]
    coder = compressor.pack_layout.indices
    if isinstance(coder, PackedIndices):
        return 2 * len(lengths) + -(-sum(sent) * (coder.index_bits + width) // 8)
    assert isinstance(coder, RiceIndices)
    r, n_zeros, most = coder.remainder_bits, 0, 0
    entries = compressor.entries(packed, part)
    chunk = 64 if isinstance(compressor, DctTopK) else 1
    for length, k, first, last in zip(lengths, sent, entries.offsets, entries.offsets[1:], strict=False):
        index = entries.position_E[first:last] % compressor.pack_layout.n_coefficients
        n_zeros += int(((np.diff(index, prepend=-1) - 1) >> r).sum())
        whole = isinstance(compressor.pack_layout.groups(part.shape), Tiles)
        n_coefficients = compressor.group_size if whole else -(-length // chunk) * chunk
        most += k + ((n_coefficients - k) >> r)
    unary = -(-most // 8) if -(-most // 8) <= 32 else -(-(sum(sent) + n_zeros) // 8)
    return 2 * len(lengths) + -(-sum(sent) * (r + width) // 8) + unary


def has_expected_bytes(compressor: Compressor, packed: Packed, part: Part) -> bool:
    expected = expected_bytes(compressor, packed, part)
    if isinstance(compressor, Dense) and compressor.zstd:
        return n_bytes_of(packed) <= expected
    return n_bytes_of(packed) == expected
