"""A benchmark's result as tables for people."""

from __future__ import annotations

from typing import Any

import pytest

from thinwire.node.bench.tables import tables_of
from thinwire.node.bench.view import print_bench

TIME = {"median_s": 0.0021, "min_s": 0.002, "max_s": 0.0025}
RESULT: dict[str, Any] = {
    "bench": "noise",
    "machine": "a machine",
    "n_params": 28_000_000,
    "copy_bandwidth_bytes_per_s": 9.87e9,
    "apply": {**TIME, "ratio_to_copy": 1.5},
    "draw": TIME,
    "compressors": {"dct": {"n_bytes": 123_456, "bits_per_coefficient": 13.02}, "top": {"n_bytes": 99}},
}


def test_what_is_alike_stands_in_one_table() -> None:
    facts, times, compressors = tables_of("bench noise", RESULT)
    assert facts.rows["parameters"] == {"": "28,000,000"}
    assert facts.rows["copy bandwidth"] == {"": "9.87 GB/s"}
    assert times.columns == ("median", "least .. most", "ratio to copy")
    assert times.rows["draw"] == {"median": "2.1 ms", "least .. most": "2 ms .. 2.5 ms"}
    assert (compressors.title, tuple(compressors.rows)) == ("bench noise: compressors", ("dct", "top"))
    assert compressors.rows["dct"] == {"bytes": "123.5 kB", "bits per coefficient": "13"}


def test_a_table_that_would_be_too_wide_is_turned() -> None:
    wide = {"one": {f"figure_{i}": i for i in range(9)}}
    (table,) = tables_of("bench", wide)
    assert (table.title, table.columns, table.rows["figure 8"]) == ("bench: one", (), {"": "8"})


def test_small_rates_and_large_means_are_readable() -> None:
    (link,) = tables_of("bench link", {"bytes_per_s": 1.25e6, "sent_bytes_per_peer_and_round": 9123.08})
    assert link.rows["bytes per second"] == {"": "1.2 MB/s"}
    assert link.rows["sent bytes per peer and round"] == {"": "9,123"}


def test_every_figure_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_bench([RESULT, {**RESULT, "n_params": 1_000_000}])
    out = capsys.readouterr().out
    for text in ("bench noise, 28,000,000 parameters", "2.1 ms", "123.5 kB", "1,000,000 parameters"):
        assert text in out
