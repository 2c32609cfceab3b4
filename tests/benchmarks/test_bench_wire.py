"""`thinwire bench wire`: each compressor sends what its formula says, less than the published programs."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import pytest

from thinwire.compression.numerics.index_layout import remainder_bits
from thinwire.node.bench.command import bench_command
from thinwire.node.bench.wire import MEASURED, PUBLISHED, rice_bits

N_PARAMS = 2_000_000


@pytest.fixture
def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    bench_command("wire", [N_PARAMS], 1, as_json=True)
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_measured_bits_are_those_of_the_formula(result: dict[str, Any]) -> None:
    rows = result["compressors"]
    assert rows.keys() == MEASURED.keys()
    for name, row in rows.items():
        assert row["bits_per_coefficient"] == pytest.approx(
            row["bits_per_coefficient_by_formula"], rel=0.05
        ), name
    assert rows["dct_topk 32 of 4096, 1 bit, rice"]["bits_per_coefficient"] <= 10.5
    assert rows["topk 32 of 4096, 1 bit, rice"]["bits_per_coefficient"] <= 10.5
    assert rows["dct_topk 32 of 4096, 1 bit, packed"]["bits_per_coefficient"] == pytest.approx(13.5, rel=0.01)
    assert rows["topk 32 of 4096, 2 bit, rice"]["bits_per_coefficient"] < 11.5


def test_the_published_figures_stand_beside_ours(result: dict[str, Any]) -> None:
    references = result["references"]
    assert references.keys() > PUBLISHED.keys()
    for name, row in references.items():
        assert row["times_fewer"] == pytest.approx(row["published_bytes"] / row["our_bytes"]), name
    assert references["DeMo 320 M k 32"]["times_fewer"] > 9
    assert references["SparseLoCo 1 B, 64 of 4096, paper"]["times_fewer"] > 1.4
    assert references["Streaming DiLoCo 1 B, 4 bit"]["times_fewer"] == pytest.approx(1, rel=0.01)
    assert references["FedKSeed, per probe"]["times_fewer"] > 1


@pytest.mark.parametrize(("n", "k"), [(4096, 8), (4096, 32), (4096, 64), (16384, 32)])
def test_no_code_of_sets_of_indices_is_shorter_by_a_fortieth(n: int, k: int) -> None:
    entropy = math.log2(math.comb(n, k)) / k
    assert entropy < rice_bits(n, k) < 1.025 * entropy


@pytest.mark.parametrize(("n", "k"), [(12, 1), (12, 3), (14, 5), (9, 9)])
def test_the_mean_over_all_sets_of_indices(n: int, k: int) -> None:
    r = remainder_bits(n, k)
    gaps = [
        b - a - 1 for chosen in combinations(range(n), k) for a, b in zip((-1, *chosen), chosen, strict=False)
    ]
    assert rice_bits(n, k) == pytest.approx(r + 1 + sum(gap >> r for gap in gaps) / len(gaps))
