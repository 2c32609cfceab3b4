"""`thinwire bench` on a small model: what it reports. Speed itself is no matter of pass or fail."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from typing import Any

import pytest
import torch

from thinwire.compression.errors import ConfigError
from thinwire.node.bench import bench_command, copy_bandwidth, measure, run_bench, transformer
from thinwire.node.bench_decoupled import Demo, cosine_basis

N_PARAMS = 2_000_000


def keys_of(result: dict[str, Any]) -> set[str]:
    return {"bench", "machine", "n_params", "ratio_to_baseline", "fraction_of_copy_bandwidth"} - result.keys()


def test_noise_reports_its_ratios() -> None:
    result = run_bench("noise", N_PARAMS, n_repeats=2)
    assert keys_of(result) == set()
    assert result["ratio_to_baseline"] == result["probes_1"]["ratio_to_baseline"]
    for n in (1, 16):
        step = result[f"probes_{n}"]
        expected = n * result["mezo_step"]["median_s"] / step["step"]["median_s"]
        assert step["ratio_to_baseline"] == pytest.approx(expected)
    assert 0 < result["fraction_of_copy_bandwidth"] < 10


def test_decoupled_reports_bytes_and_ratios() -> None:
    result = run_bench("decoupled", N_PARAMS, n_repeats=1)
    assert keys_of(result) == set()
    assert result["n_peers"] == 4
    # 32 of 4096 coefficients at 13 bits and a scale: about 0.106 bits per parameter.
    assert result["payload_n_bytes"] * 8 / result["n_params"] == pytest.approx(0.1055, rel=0.02)
    for key in ("ratio_to_baseline", "ratio_to_adamw", "fraction_of_copy_bandwidth"):
        assert 0 < result[key] < 100


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    bench_command("decoupled", N_PARAMS, 1, as_json=True)
    assert json.loads(capsys.readouterr().out)["bench"] == "decoupled"


def test_the_table_names_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    bench_command("decoupled", N_PARAMS, 1, as_json=False)
    printed = capsys.readouterr().out
    for words in ("ratio_to_baseline", "fraction_of_copy_bandwidth", "GB/s", "round median_s", "ms"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nois", None, 1), "no benchmark is called 'nois'"),
        (("noise", 10, 1), "10 parameters"),
        (("noise", None, 0), "0 repeats"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, int | None, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_bench(*arguments)


def test_benchmarks_import_without_network_packages() -> None:
    code = (
        "import sys, thinwire.node.bench_noise, thinwire.node.bench_decoupled; "
        "print(sorted({'hivemind', 'ray', 'grpc'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_measure_leaves_the_warm_up_out() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(1), n_repeats=3, n_warm_up=2)
    assert len(calls) == 5
    assert 0 < timing.min_s <= timing.median_s <= timing.max_s


def test_the_model_has_about_the_size_that_was_asked_for() -> None:
    for n_params in (2_000_000, 28_000_000):
        n = sum(prod(p.shape) for p in transformer(n_params).values())
        assert n == pytest.approx(n_params, rel=0.25)
    assert copy_bandwidth(1_000_000, 5) > 1e8


def test_the_baseline_is_demo() -> None:
    """Its transform is orthonormal and keeps the largest coefficients: a sparse signal comes back."""
    basis = cosine_basis(64)
    torch.testing.assert_close(basis.T @ basis, torch.eye(64), atol=1e-5, rtol=0)
    demo = Demo({})
    smooth = basis[:, 3][:, None] * basis[:, 5][None, :] - 0.5 * basis[:, 1][:, None] * basis[:, 2][None, :]
    x = smooth.repeat(2, 3)
    torch.testing.assert_close(demo.decode([demo.select(x)] * 4, x.shape), x, atol=1e-5, rtol=0)
