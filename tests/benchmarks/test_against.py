"""`thinwire bench --against`: what counts as worse, and the published figures themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.node.bench.against import compare, load
from thinwire.node.bench.command import BENCHES, NOT_IN_ALL

PUBLISHED = Path(__file__).parent / "published.json"


def result(low: float, high: float, cpu_s: float, n_bytes: int = 100) -> dict[str, Any]:
    timing = {"median_s": (low + high) / 2, "min_s": low, "max_s": high, "cpu_s": cpu_s}
    return {"bench": "noise", "n_params": 5, "round": {"step": timing}, "payload_n_bytes": n_bytes}


@pytest.mark.parametrize(
    ("low", "high", "cpu_s", "n_bytes", "verdicts"),
    [
        (1.1, 1.9, 1.5, 100, ["", ""]),
        (1.9, 9.0, 3.0, 101, ["", ""]),  # a run was as quick as one of then
        (2.1, 9.0, 1.9, 100, ["", ""]),  # the machine had other work to do
        (2.1, 9.0, 2.0, 102, ["worse", "worse"]),
        (0.5, 0.9, 1.1, 98, ["better", "better"]),
        (0.5, 0.9, 1.5, 100, ["", ""]),
    ],
)
def test_worse_is_what_noise_does_not_explain(
    low: float, high: float, cpu_s: float, n_bytes: int, verdicts: list[str]
) -> None:
    then, now = {"noise": [result(1.0, 2.0, 1.5)]}, {"noise": [result(low, high, cpu_s, n_bytes)]}
    rows = compare(then, now)
    assert [row.name for row in rows] == ["noise 5: round step", "noise 5: payload_n_bytes"]
    assert [row.verdict for row in rows] == verdicts


def test_only_the_same_is_compared() -> None:
    then = {"noise": [result(1, 2, 1)], "wire": [result(1, 2, 1)]}
    other = result(1, 2, 1) | {"n_params": 6}
    assert compare(then, {"noise": [other]}) == []
    assert len(compare(then, {"noise": [other, result(1, 2, 1)]})) == 2


def test_one_benchmark_several_sizes_and_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    machine = {"machine": {"cpu": "x"}}
    path.write_text(json.dumps(result(1, 2, 1) | machine))
    assert [r["n_params"] for r in load(path)["noise"]] == [5]
    path.write_text(
        json.dumps({"noise": {"bench": "noise", **machine, "sizes": [{"n_params": 1}, {"n_params": 2}]}})
    )
    assert [r["n_params"] for r in load(path)["noise"]] == [1, 2]
    for text in ("", "[]", '{"noise": 3}', '{"a": {"b": 1}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"--against {path}"):
            load(path)
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none")


def test_the_published_figures_can_be_rerun() -> None:
    """They say of every benchmark when, where and how it was measured."""
    published = load(PUBLISHED)
    assert published.keys() == BENCHES.keys() - NOT_IN_ALL
    for results in published.values():
        for each in results:
            assert each["machine"].keys() >= {"date", "command", "cpu", "n_cores", "torch"}
    assert len(compare(published, published)) > 60
    assert {row.verdict for row in compare(published, published)} == {""}
