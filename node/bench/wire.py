"""`thinwire bench wire`: bits per coefficient of every compressor, measured and by formula, and the published
byte counts of the programs that they come from beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Any, Final

import torch

from ...compression import wire
from ...compression.base import Compressor, Field, Part, Turn
from ...compression.codecs.dct_topk import DctTopK
from ...compression.codecs.dense import Dense
from ...compression.codecs.random_k import RandomK
from ...compression.codecs.slicing import Slicing
from ...compression.codecs.striding import Striding
from ...compression.codecs.topk import TopK
from ...compression.numerics.index_layout import remainder_bits
from .measure import transformer

N_PROBES: Final = 16

# Bits of a scale, shared by so many values.
_SCALE: Final = 16


def rice_bits(n: int, k: int) -> float:
    """Mean bits of one of k indices of n: r + 1 + E[gap >> r], P(gap >= t) = C(n - t, k) / C(n, k)."""
    r = remainder_bits(n, k)
    return r + 1 + sum(comb(n - t, k) / comb(n, k) for t in range(1 << r, n - k + 1, 1 << r))


def _rice(k: int, n: int, value_bits: int) -> float:
    return _SCALE / k + rice_bits(n, k) + value_bits


def _packed(k: int, n: int, value_bits: int) -> float:
    return _SCALE / k + (n - 1).bit_length() + value_bits


def _dense(value_bits: int, group_size: int = 1024) -> float:
    return value_bits + _SCALE / group_size


# What is measured: a row of the table. Beside it bits per coefficient by formula, in a full group with its
# scale; Rice-coded indices in the mean over all sets.
MEASURED: Final[dict[str, tuple[Compressor, float]]] = {
    "dct_topk 32 of 4096, 1 bit, packed": (DctTopK(), _packed(32, 4096, 1)),
    "dct_topk 32 of 4096, 1 bit, rice": (DctTopK(indices="rice"), _rice(32, 4096, 1)),
    "dct_topk 32 of 4096, 8 bit, rice": (DctTopK(indices="rice", bits=8), _rice(32, 4096, 8)),
    "dct_topk 8 of 4096, 1 bit, rice": (DctTopK(k=8, indices="rice"), _rice(8, 4096, 1)),
    "dct_topk 32 of 16384, 1 bit, rice": (DctTopK(group_size=16384, indices="rice"), _rice(32, 16384, 1)),
    "dct_topk tiles 32 of 64 x 64, 1 bit, rice": (
        DctTopK(layout="tiles", indices="rice"),
        _rice(32, 4096, 1),
    ),
    "topk 32 of 4096, 1 bit, rice": (TopK(), _rice(32, 4096, 1)),
    "topk 32 of 4096, 2 bit, rice": (TopK(bits=2), _rice(32, 4096, 2)),
    "topk 64 of 4096, 2 bit, rice": (TopK(k=64, bits=2), _rice(64, 4096, 2)),
    "topk 64 of 4096, e3m0, rice": (TopK(k=64, bits="e3m0"), _rice(64, 4096, 4)),
    "random_k 1 / 32, 1 bit": (RandomK(bits=1), _dense(1)),
    "random_k 1 / 32, fp16": (RandomK(bits=16), _dense(16)),
    "striding 1 / 32, 2 bit": (Striding(bits=2), _dense(2)),
    "slicing 1 / 32, 4 bit": (Slicing(bits=4), _dense(4)),
    "dense 8 bit": (Dense(bits=8), _dense(8)),
    "dense e3m0": (Dense(bits="e3m0"), _dense(4)),
    "dense fp32": (Dense(), 32.0),
}


@dataclass(frozen=True, slots=True)
class Published:
    """Bytes per peer and exchange that others publish for a model, and which row of ours does the same.

    `share`: coefficients per parameter.
    """

    n_params: float
    n_bytes: float
    share: float
    row: str
    source: str


_DEMO, _DEMO_8 = "dct_topk 32 of 4096, 1 bit, rice", "dct_topk 32 of 16384, 1 bit, rice"
_SPARSELOCO = "topk 64 of 4096, 2 bit, rice"
PUBLISHED: Final[dict[str, Published]] = {
    "DeMo 320 M k 32": Published(320e6, 29.9e6, 32 / 4096, _DEMO, "arXiv 2411.19870"),
    "DeMo 320 M k 8": Published(320e6, 7.49e6, 8 / 4096, _DEMO_8, "arXiv 2411.19870"),
    "DeMo 1.18 B k 32": Published(1.18e9, 110.3e6, 32 / 4096, _DEMO, "arXiv 2411.19870"),
    "DeMo 1.18 B k 8": Published(1.18e9, 4 * 6.89e6, 8 / 4096, _DEMO_8, "4 times k 2, arXiv 2411.19870"),
    "SparseLoCo 1 B, 64 of 4096, paper": Published(
        1e9, 1e9 * 64 / 4096 * 14 / 8, 64 / 4096, _SPARSELOCO, "14 bits per coefficient, as the paper claims"
    ),
    "SparseLoCo 1 B, 64 of 4096, program": Published(
        1e9, 1e9 * 64 / 4096 * 20 / 8, 64 / 4096, _SPARSELOCO, "20 bits per coefficient, as its source sends"
    ),
    "Streaming DiLoCo 1 B, 4 bit": Published(
        1e9, 1e9 / 2, 1.0, "dense e3m0", "arXiv 2501.18512, all fragments together"
    ),
}


def bench_wire(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """A row of `command.BENCHES`: payloads of a random momentum in the shapes of a transformer; no times."""
    del n_repeats, device
    parts = {name: Part.whole(p.shape) for name, p in transformer(n_params).items()}
    generator = torch.Generator().manual_seed(3)
    momentum = {name: torch.randn(part.n_global, generator=generator) for name, part in parts.items()}
    rows = {name: measured(c, by, parts, momentum) for name, (c, by) in MEASURED.items()}
    return {
        "n_params": sum(part.n_global for part in parts.values()),
        "compressors": rows,
        "references": {name: compared(p, rows[p.row]) for name, p in PUBLISHED.items()} | probes(),
    }


def measured(
    compressor: Compressor,
    bits_by_formula: float,
    parts: Mapping[str, Part],
    momentum: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """One payload as it goes over the network, its head and checksum included."""
    turn = Turn(round=1, shared_seed=1, own_seed=2, lr_factor=1.0)
    fields = {name: compressor.fields(part) for name, part in parts.items()}
    payload = {name: compressor.pack(momentum[name], part, turn) for name, part in parts.items()}
    n_bytes = len(wire.encode(payload, fields, turn.round, bytes(8)))
    n_coefficients = sum(compressor.n_sent(part) for part in parts.values())
    return {
        "n_bytes": n_bytes,
        "bits_per_coefficient": 8 * n_bytes / n_coefficients,
        "bits_per_coefficient_by_formula": bits_by_formula,
        "bits_per_parameter": 8 * n_bytes / sum(part.n_global for part in parts.values()),
    }


def compared(published: Published, row: Mapping[str, Any]) -> dict[str, Any]:
    n_bytes = published.n_params * published.share * row["bits_per_coefficient"] / 8
    return {
        "published_bytes": published.n_bytes,
        "our_bytes": n_bytes,
        "times_fewer": published.n_bytes / n_bytes,
        "with": published.row,
        "source": published.source,
    }


def probes() -> dict[str, dict[str, Any]]:
    """Zeroth-order methods, per probe: ours are measured on an offer of 16 probes."""
    fields = {"codes": (Field(torch.uint8, N_PROBES),)}
    codes = torch.ones(N_PROBES, dtype=torch.uint8)
    per_probe = len(wire.encode({"codes": (codes,)}, fields, 1, bytes(8))) / N_PROBES
    row = {
        "published_bytes": 4.0,
        "our_bytes": per_probe,
        "our_bytes_without_head": 1.0,
        "times_fewer": 4.0 / per_probe,
        "with": f"spsa, {N_PROBES} probes per offer",
    }
    return {
        "FedKSeed, per probe": {**row, "source": "4 bytes per scalar, besides seeds; arXiv 2312.06353"},
        "DeComFL, per probe": {**row, "source": "4 bytes per scalar, besides seeds; arXiv 2405.15861"},
    }
