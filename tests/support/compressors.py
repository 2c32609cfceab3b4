"""What the contract suite knows of each compressor: one row per name in the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from thinwire.compression.base import Compressor, Packed, Part
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.dense import Dense
from thinwire.compression.codecs.random_k import RandomK
from thinwire.compression.codecs.selection import Selection
from thinwire.compression.codecs.slicing import Slicing
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.striding import Striding
from thinwire.compression.codecs.tiles import Tiles
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.numerics.index_layout import PackedIndices

BadPayloads = Iterator[tuple[str, Packed, str]]
"""What is wrong, the payload, the reason for which it is refused."""

WIDTHS: Final = (1, 2, 4, 8, 16, "e3m0")
"""`bits` of every compressor; those without indices know 32, too."""


@dataclass(frozen=True)
class Row:
    """`examples`: what the suite runs with, by names that the golden files know. `small`: options for every
    way to write values and indices, with small groups. `expected_bytes`: of a pack whose groups all have
    values other than zero, counted from the compressor's docstring. `bad_payloads`: made of a good one.

    `is_exact`: all packs of a shape have as many bytes. `may_be_shorter`: than expected. `rate`: share of the
    elements that a round sends. `group_size`: of neighbours that share a scale, if any do.
    """

    examples: Mapping[str, Any]
    small: Sequence[dict[str, Any]]
    expected_bytes: Callable[[Any, Packed, Part], int]
    bad_payloads: Callable[[Any, Packed], BadPayloads]
    is_exact: Callable[[Any], bool] = lambda compressor: True
    may_be_shorter: Callable[[Any], bool] = lambda compressor: False
    rate: Callable[[Any], float] = lambda compressor: 1.0
    group_size: Callable[[Any], int | None] = lambda compressor: None


# ------------------------------------------------------------------------------------------- bytes


def value_bits(bits: int | str) -> int:
    return 4 if isinstance(bits, str) else bits


def dense_bytes(compressor: Dense | Selection, m: int) -> int:
    """Of m values without indices; with zstd the most."""
    width = value_bits(compressor.bits)
    return 4 * m if width == 32 else 2 * -(-m // compressor.group_size) + -(-m * width // 8)


def selected_bytes(compressor: Selection, packed: Packed, part: Part) -> int:
    share = compressor.share
    return dense_bytes(compressor, -(-part.n_global * share.numerator // share.denominator))


def striding_bytes(compressor: Striding, packed: Packed, part: Part) -> int:
    stride = -(-compressor.share.denominator // compressor.share.numerator)
    return dense_bytes(compressor, len(range(0, part.n_global, stride)))


def group_lengths(compressor: Sparse, part: Part) -> list[int]:
    """Elements of each group, counted one by one."""
    n = part.n_global
    group = torch.arange(n) // compressor.group_size
    if isinstance(tiles := compressor.pack_layout.groups(part.shape), Tiles):
        row, column = torch.arange(n) // tiles.columns, torch.arange(n) % tiles.columns
        group = row // tiles.side * -(-tiles.columns // tiles.side) + column // tiles.side
    return group.bincount().tolist() if n else []


def sparse_bytes(compressor: Sparse, packed: Packed, part: Part) -> int:
    lengths, width = group_lengths(compressor, part), value_bits(compressor.bits)
    sent = [-(-compressor.k * length // compressor.group_size) for length in lengths]
    indices = compressor.pack_layout.indices
    if isinstance(indices, PackedIndices):
        return 2 * len(lengths) + -(-sum(sent) * (indices.index_bits + width) // 8)
    r, n_zeros, most = indices.remainder_bits, 0, 0
    entries = compressor.entries(packed, part)
    chunk = 64 if isinstance(compressor, DctTopK) else 1
    is_tiled = isinstance(compressor.pack_layout.groups(part.shape), Tiles)
    for length, k, first, last in zip(lengths, sent, entries.offsets, entries.offsets[1:], strict=False):
        index = entries.position_E[first:last] % compressor.pack_layout.n_coefficients
        n_zeros += int(((np.diff(index, prepend=-1) - 1) >> r).sum())
        n_coefficients = compressor.group_size if is_tiled else -(-length // chunk) * chunk
        most += k + ((n_coefficients - k) >> r)
    unary = -(-most // 8) if -(-most // 8) <= 32 else -(-(sum(sent) + n_zeros) // 8)
    return 2 * len(lengths) + -(-sum(sent) * (r + width) // 8) + unary


# ------------------------------------------------------------------------------------------- bad payloads


def bad_numbers(compressor: Compressor, packed: Packed) -> BadPayloads:
    """In the first tensor: scales, or the values themselves."""
    numbers = {"nan": "nan", "inf": "nan", "-inf": "nan", "1152921504606846976": "range"}
    for number, reason in numbers.items():
        first = packed[0].clone()
        first[min(1, first.numel() - 1)] = float(number)
        yield number, (first, *packed[1:]), reason


def bad_values(compressor: Dense | Selection, packed: Packed) -> BadPayloads:
    """Of groups with scales, or with 32 bits of the values themselves."""
    return (bad_numbers if compressor.bits == 32 else bad_scales)(compressor, packed)


def bad_scales(compressor: Compressor, packed: Packed) -> BadPayloads:
    """And what scales, one for each group, cannot be."""
    yield from bad_numbers(compressor, packed)
    scales, codes = packed
    yield "negative scales", (-scales, codes), "range"
    yield "a scale less", (scales[:-1], codes), "shape"


# ------------------------------------------------------------------------------------------- rows


def widths(options: Mapping[str, Any], *, more: Sequence[int] = ()) -> list[dict[str, Any]]:
    return [{**options, "bits": bits} for bits in (*WIDTHS, *more)]


def sparse_row(examples: Mapping[str, Sparse], *small: Mapping[str, Any]) -> Row:
    both = [{**options, "indices": indices} for options in small for indices in ("packed", "rice")]
    return Row(
        examples,
        [config for options in both for config in widths(options)],
        sparse_bytes,
        bad_scales,
        is_exact=lambda c: c.indices == "packed",
        group_size=lambda c: c.group_size,
    )


def selection_row(
    examples: Mapping[str, Selection], expected_bytes: Callable[[Any, Packed, Part], int] = selected_bytes
) -> Row:
    return Row(
        examples,
        widths({"rate": 0.3, "group_size": 24}, more=[32]),
        expected_bytes,
        bad_values,
        rate=lambda c: c.rate,
    )


ROWS: Final[dict[str, Row]] = {
    "dct_topk": sparse_row(
        {
            "dct_topk 1 bit": DctTopK(),
            "dct_topk 8 bit": DctTopK(bits=8),
            "dct_topk small groups": DctTopK(k=5, group_size=192, bits=1),
            "dct_topk all, 8 bit": DctTopK(k=128, group_size=128, bits=8),
            "dct_topk rice, 1 bit": DctTopK(indices="rice"),
            "dct_topk rice, odd groups, 2 bit": DctTopK(k=7, group_size=100, bits=2, indices="rice"),
            "dct_topk tiles, 4 bit": DctTopK(layout="tiles", bits=4),
            "dct_topk small tiles, rice, fp16": DctTopK(
                k=3, group_size=64, bits=16, indices="rice", layout="tiles"
            ),
        },
        {"layout": "flat", "k": 7, "group_size": 128},
        {"layout": "tiles", "k": 5, "group_size": 64},
    ),
    "topk": sparse_row(
        {
            "topk 1 bit": TopK(),
            "topk 2 bit": TopK(k=64, bits=2),
            "topk packed, e3m0": TopK(k=5, group_size=100, bits="e3m0", indices="packed"),
            "topk all, fp16": TopK(k=64, group_size=64, bits=16),
        },
        {"k": 9, "group_size": 100},
    ),
    "random_k": selection_row(
        {
            "random_k 1 bit": RandomK(rate=0.25, bits=1),
            "random_k 8 bit": RandomK(rate=0.3, group_size=64),
        }
    ),
    "striding": selection_row(
        {
            "striding 2 bit": Striding(rate=0.25, bits=2),
            "striding fp16": Striding(rate=0.1, bits=16, group_size=8),
        },
        striding_bytes,
    ),
    "slicing": selection_row(
        {
            "slicing 4 bit": Slicing(rate=0.25, bits=4),
            "slicing 32 bit": Slicing(rate=0.1, bits=32),
        }
    ),
    "dense": Row(
        {
            "dense": Dense(),
            "dense 1 bit": Dense(bits=1),
            "dense e3m0": Dense(bits="e3m0", group_size=64),
            "dense 4 bit, zstd": Dense(bits=4, group_size=64, zstd=True),
        },
        [c for zstd in (False, True) for c in widths({"group_size": 24, "zstd": zstd}, more=[32])],
        lambda c, packed, part: dense_bytes(c, part.n_global),
        bad_values,
        is_exact=lambda c: not c.zstd,
        may_be_shorter=lambda c: c.zstd,
        group_size=lambda c: c.group_size,
    ),
}

EXAMPLES: Final[dict[str, Compressor]] = {
    name: compressor for row in ROWS.values() for name, compressor in row.examples.items()
}


def row_of(compressor: Compressor) -> Row:
    """The row of its class."""
    return next(row for row in ROWS.values() if type(compressor) in {type(c) for c in row.examples.values()})


def small_compressors() -> list[dict[str, Any]]:
    """Every compressor as a config, with every way to write values and indices, and small groups."""
    return [{"name": name, **options} for name, row in ROWS.items() for options in row.small]


def name_of(config: dict[str, Any]) -> str:
    """For the names of tests."""
    return " ".join(
        str(v) for k, v in config.items() if k in ("name", "layout", "indices", "bits") or v is True
    )


def n_bytes_of(packed: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in packed)


def has_expected_bytes(compressor: Compressor, packed: Packed, part: Part) -> bool:
    """Whether a pack has the bytes that its docstring promises, where its class says exactly how many."""
    row = row_of(compressor)
    expected = row.expected_bytes(compressor, packed, part)
    return n_bytes_of(packed) == expected or (
        row.may_be_shorter(compressor) and n_bytes_of(packed) < expected
    )
