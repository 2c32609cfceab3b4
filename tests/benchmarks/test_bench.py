"""`thinwire bench` on a small model: what it reports. Speed itself is no matter of pass or fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from thinwire.compression.errors import ConfigError
from thinwire.node.bench import join
from thinwire.node.bench.command import (
    BENCHES,
    bench_command,
    parse_sizes,
    run_bench,
    run_sizes,
)
from thinwire.node.bench.decoupled import DecoupledRound, InexactApply
from thinwire.node.bench.diloco import PlainDiloco
from thinwire.node.bench.learning.demo import cosine_basis, decode, select
from thinwire.node.bench.measure import copy_bandwidth, fill_gradients, measure, transformer
from thinwire.node.bench.view import print_bench

N_PARAMS = 2_000_000


def keys_of(result: dict[str, Any]) -> set[str]:
    return {"bench", "machine", "n_params", "ratio_to_baseline", "fraction_of_copy_bandwidth"} - result.keys()


def assert_noise_reports_its_ratios(result: dict[str, Any]) -> None:
    assert keys_of(result) == set()
    assert result["ratio_to_baseline"] == result["probes_1"]["ratio_to_baseline"]
    for n in (1, 16):
        step = result[f"probes_{n}"]
        expected = n * result["mezo_step"]["median_s"] / step["step"]["median_s"]
        assert step["ratio_to_baseline"] == pytest.approx(expected)
    assert 0 < result["fraction_of_copy_bandwidth"] < 10


def test_decoupled_reports_bytes_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_bench("decoupled", N_PARAMS, n_repeats=1)
    assert keys_of(result) == set()
    assert result["n_peers"] == 4
    # 32 of 4096 coefficients at 13 bits and a scale: about 0.106 bits per parameter.
    assert result["payload_n_bytes"] * 8 / result["n_params"] == pytest.approx(0.1055, rel=0.02)
    for key in ("ratio_to_baseline", "ratio_to_adamw", "fraction_of_copy_bandwidth"):
        assert 0 < result[key] < 100
    for part in ("propose", "apply", "fingerprint"):
        expected = result[part]["least_n_bytes"] / result["copy_bandwidth_bytes_per_s"]
        assert result[part]["fraction_of_copy_bandwidth"] == pytest.approx(
            expected / result[part]["median_s"]
        )
    exactness = result["exactness"]
    extra = max(0.0, exactness["exact_update_share_of_round"]) + exactness["fingerprint_share_of_round"]
    assert exactness["share_of_round"] == pytest.approx(extra)
    print_bench([result])
    printed = capsys.readouterr().out
    for words in ("ratio to baseline", "fraction of copy bandwidth", "GB/s", ": round", " ms .. ", "│ cpu "):
        assert words in printed


def test_an_inexact_update_is_the_same_but_for_rounding() -> None:
    model = transformer(1_000_000)
    fill_gradients(model.values())
    round_ = DecoupledRound(model)
    inexact = InexactApply(model, round_)
    before = {name: p.detach().clone() for name, p in model.items()}
    inexact.step()
    moved = {name: p.detach() - before[name] for name, p in model.items()}
    for name, p in model.items():
        p.data.copy_(before[name])
    round_.apply()
    for name, p in model.items():
        assert float(((p.detach() - before[name]) - moved[name]).abs().gt(1e-6).float().mean()) < 0.01


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


def test_benchmarks_run_without_network_packages() -> None:
    code = """
import json, sys
for package in ("hivemind", "ray", "grpc", "multiaddr"):
    sys.modules[package] = None  # importing it fails
import thinwire.node.bench.diloco, thinwire.node.bench.memory, thinwire.node.bench.noise
import thinwire.node.bench.peers
from thinwire.node.bench.command import run_bench
from thinwire.node.cli.main import main
run_bench("decoupled", 1_000_000, 1)
main(["bench", "wire", "--params", "1e6", "--repeats", "1", "--json"])
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    assert json.loads(out.stdout)["bench"] == "wire"


def test_diloco_reports_bytes_and_ratios() -> None:
    result = run_bench("diloco", N_PARAMS, n_repeats=1)
    assert keys_of(result) == set()
    assert result["dense_e3m0"]["ratio_to_ddp_bytes"] == pytest.approx(12, rel=0.02)  # 48 bits against 4
    for method in ("dense_e3m0", "sparseloco"):
        row = result[method]
        assert row["ratio_to_baseline"] == pytest.approx(
            result["plain_round"]["median_s"] / row["round"]["median_s"]
        )
        assert row["ratio_to_ddp_bytes"] == pytest.approx(
            result["ddp_n_bytes_per_step"] / row["payload_n_bytes"]
        )
    assert result["sparseloco"]["least_n_bytes"] < result["dense_e3m0"]["least_n_bytes"]


def test_the_baseline_is_diloco() -> None:
    """What peers of the same difference do together is what one of them does alone: Nesterov's first step."""
    model = transformer(1_000_000)
    before = {name: p.detach().clone() for name, p in model.items()}
    plain = PlainDiloco(model)
    plain.adamw.step = lambda: None  # type: ignore[assignment, method-assign]
    for p, others in zip(plain.inner, plain.others[0], strict=True):
        p.data.sub_(others)
    plain.run()
    for name, p in model.items():
        torch.testing.assert_close(p.detach(), before[name] - 0.7 * 1.9 * 1e-4, atol=1e-7, rtol=0)


def test_peers_cost_the_more_the_more_they_are() -> None:
    result = run_bench("peers", 1_000_000, n_repeats=1)
    for strategy in ("spsa", "decoupled"):
        rows = result[strategy]
        assert {f"peers_{n}" for n in (1, 4, 16, 64, 256)} <= rows.keys()
        assert rows["peers_256"]["median_s"] > rows["peers_1"]["median_s"]
        assert rows["further_peer_s"] > 0


def test_several_sizes_are_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = parse_sizes("4e6,1e6,1e6")
    assert sizes == [1_000_000, 4_000_000]
    picture = tmp_path / "noise.png"
    bench_command("noise", sizes, 1, as_json=True, picture=picture)
    printed = json.loads(capsys.readouterr().out)
    assert printed["bench"] == "noise"
    assert [round(size["n_params"] / 1e6) for size in printed["sizes"]] == [2, 4]
    for size in printed["sizes"]:
        assert_noise_reports_its_ratios({"bench": "noise", "machine": printed["machine"], **size})
    assert picture.read_bytes().startswith(b"\x89PNG")
    bench_command("wire", sizes, 1, as_json=False)
    titles = set(re.findall(r"^bench wire, ([\d,]+) parameters", capsys.readouterr().out, flags=re.M))
    assert len(titles) == 2


def test_a_size_has_no_influence_on_some() -> None:
    assert {"round", "join"} <= BENCHES.keys()
    with pytest.raises(ConfigError, match="0 repeats"):
        run_sizes("round", [1_000_000, 2_000_000], 0)


@pytest.mark.parametrize("text", ["", "1e6,", "many", "1e6;2e6", "inf"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="numbers with commas"):
        parse_sizes(text)


def test_what_does_not_fit_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def free_bytes(_device: str) -> int:
        return 16 * 3_000_000

    (result,) = run_sizes("noise", [1_000_000, 4_000_000], 1, free_bytes=free_bytes)
    assert result["n_params"] < 3_000_000
    assert "4.0e+06 parameters do not fit" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="do not fit into the free memory: take fewer"):
        run_sizes("noise", [4_000_000], 1, free_bytes=free_bytes)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU"):
        run_bench("noise", N_PARAMS, 1, device="cuda")
    with pytest.raises(ConfigError, match="cpu or cuda"):
        run_bench("noise", N_PARAMS, 1, device="tpu")


def test_bytes_have_a_picture_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "wire.png"
    bench_command("wire", [1_000_000], 1, as_json=True, picture=picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "wire.json").write_text(capsys.readouterr().out)
    bench_command("wire", [1_000_000], 1, as_json=False, against=tmp_path / "wire.json")
    assert re.search(r"none of \d+ figures got worse", capsys.readouterr().err)


def test_a_picture_that_cannot_be_is_refused_first(tmp_path: Path) -> None:
    refused = {tmp_path / "x.jpg": "the picture is a PNG", tmp_path / "no" / "x.png": "is not there"}
    for path, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            bench_command("noise", [10**9], 1, as_json=False, picture=path)


@pytest.mark.swarm
def test_join_reports_what_a_node_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "ROUNDS", 10)
    result = run_bench("join", None, n_repeats=1)
    assert result["model_n_bytes"] > 100_000
    assert result["rounds_behind"] == 10
    for key in ("process_to_first_offer", "open_and_download", "catch_up"):
        assert 0 < result[key]["min_s"] <= result[key]["median_s"] <= result[key]["max_s"]
    per_round_s = result["catch_up"]["median_s"] / result["rounds_behind"]
    assert result["catch_up_per_round_s"] == pytest.approx(per_round_s)


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
    basis = cosine_basis(64, torch.device("cpu"))
    torch.testing.assert_close(basis.T @ basis, torch.eye(64), atol=1e-5, rtol=0)
    smooth = basis[:, 3][:, None] * basis[:, 5][None, :] - 0.5 * basis[:, 1][:, None] * basis[:, 2][None, :]
    x = smooth.repeat(2, 3)
    torch.testing.assert_close(decode([select(x, 32)] * 4, x.shape), x, atol=1e-5, rtol=0)
