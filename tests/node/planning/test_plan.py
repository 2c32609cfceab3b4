"""`thinwire plan`: what is measured is what a swarm does; what is computed from it; refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.local_nodes import DECOUPLED, config_of, train
from thinwire.compression.errors import ConfigError
from thinwire.node.cli.main import main
from thinwire.node.links.upload_limit import parse_rate
from thinwire.node.planning.command import chosen, told
from thinwire.node.planning.estimate import Span, estimate, exchange
from thinwire.node.planning.measuring import MIN_ROUNDS, Measured, measure

SPSA = {"name": "spsa", "lr": 1e-3, "eps": 1e-3, "probes": 6}
MEASURED = Measured(
    strategy="decoupled",
    n_parameters=1_000_000,
    n_batches=2,
    most_batches=4,
    tokens_per_batch=100,
    compute_s=(1.0, 1.2, 1.4),
    pack_s=(0.1, 0.1, 0.3),
    apply_s=(0.2, 0.2, 0.2),
    payload_bytes=(9600, 9600, 9600),
    full_bytes=9600,
    memory_bytes=2 * 10**9,
    libraries_bytes=10**9,
    device_bytes=0,
)


def test_payloads_and_batches_are_those_of_a_swarm(tmp_path: Path) -> None:
    for i, strategy in enumerate((DECOUPLED, SPSA)):
        config = config_of(strategy, rounds=2, verify_every=1, snapshot_every=2, min_peers=2)
        found = measure(config.model_dump(), 2, 0.05, "cpu", None)
        results, _, _ = train(tmp_path / str(i), config, 2)
        # A group of an embedding that a batch has no byte of has no gradient, and sends nothing.
        assert 0.8 < results[0].payload_bytes / (2 * found.full_bytes) < 1.25
        assert len(found.compute_s) == len(found.apply_s) >= MIN_ROUNDS
        assert found.most_batches == (6 if strategy is SPSA else 1)
        assert found.tokens_per_batch == 4 * 16
        assert found.memory_bytes >= found.libraries_bytes > 10**7
        assert Measured.from_json(found.to_json()) == found


def test_a_round_is_the_sum_of_its_phases() -> None:
    found = estimate(MEASURED, 5, link_bytes_per_s=100_000, rtt_s=0.1, round_s=0, memory_bytes=10**10)
    received = 4 * 9600 + 5 * 200
    assert (found.sent_bytes, found.received_bytes) == (9600 + 250, received)
    assert found.exchange_s == pytest.approx((9600 + received) / 100_000 + 0.1)
    assert found.batches == 4
    assert found.compute_s == Span(pytest.approx(2.4), pytest.approx(2.0), pytest.approx(2.8))
    assert found.round_s.least == pytest.approx(2.0 + 0.1 + 0.2 + found.exchange_s)
    assert found.round_s.most == pytest.approx(2.8 + 0.3 + 0.2 + found.exchange_s)
    assert found.round_s.median == pytest.approx(2.4 + 0.1 + 0.2 + found.exchange_s)
    assert found.tokens_per_s == pytest.approx(5 * 400 / found.round_s.median)
    assert found.ddp_bytes == pytest.approx(2 * 4 / 5 * 4 * 10**6)
    assert found.fits


def test_a_round_that_overlaps_waits_for_what_is_longer() -> None:
    for link, waits_s in ((100_000, 0.0), (10_000, (9600 + 4 * 9600 + 5 * 200) / 10_000 - 2.4)):
        found = estimate(replace(MEASURED, overlaps=True), 5, link, 0.0, round_s=0, memory_bytes=10**10)
        assert found.round_s.median == pytest.approx(2.4 + 0.1 + 0.2 + waits_s)
        assert found.link_share == pytest.approx(waits_s / found.round_s.median)


@pytest.mark.parametrize(
    ("payload", "peers", "coordinator", "given", "seconds"),
    [
        (4096, 8, 12.5e6, 0, (4096 + 8 * 4096 + 1600) / 1.25e6),  # inside of commits, to all
        (9600, 8, 12.5e6, 0, (8 * 9600 + 1600) / 1.25e6),
        (10**6, 8, 125e6, 0, (8 * 10**6 + 1600) / 1.25e6),
        (10**6, 8, 12.5e6, 1.44, (8 * 10**6 + 1600) / 1.25e6),
        (10**6, 64, 12.5e6, 52.19, 64 * 10**6 / 12.5e6 + (63 * 10**6 + 12_800) / 1.25e6),
    ],
)
def test_nodes_upload_once_and_give_what_the_coordinator_has_no_room_for(
    payload: int, peers: int, coordinator: float, given: float, seconds: float
) -> None:
    found = exchange(payload, peers, 1.25e6, 0.0, 1.0, coordinator)
    assert found.given == pytest.approx(given, rel=0.01)
    assert found.sent_bytes == pytest.approx((1 + found.given) * payload + 250, abs=1)
    assert found.seconds == pytest.approx(seconds, rel=0.1)
    trips = exchange(payload, peers, 1.25e6, 1.0, 1.0, coordinator).seconds - found.seconds
    assert trips == pytest.approx(2 if given else 1)


def test_what_does_not_fit_says_why() -> None:
    slow = estimate(MEASURED, 5, link_bytes_per_s=1000, rtt_s=0.0, round_s=0, memory_bytes=10**10)
    assert slow.verdict.startswith("waits for the link 9")
    assert not slow.fits
    large = estimate(MEASURED, 5, link_bytes_per_s=10**9, rtt_s=0.0, round_s=0, memory_bytes=10**9)
    assert "memory" in large.verdict
    timed = estimate(MEASURED, 5, link_bytes_per_s=10**9, rtt_s=0.0, round_s=2.0, memory_bytes=10**10)
    assert timed.batches == 2, "as many as the run's round_s leaves time for"


def test_the_runs_options_and_those_for_small_models() -> None:
    config = config_of({"name": "diloco", "lr": 1e-4, "inner_steps": 5, "max_seconds": 9.0})
    found = chosen(config, None)
    assert [options["name"] for options in found] == ["diloco", "decoupled", "spsa"]
    assert (found[0]["lr"], found[0]["max_seconds"]) == (1e-4, 0.0)
    assert found[1]["beta_warmup"] == 1.0
    assert [options["name"] for options in chosen(config, "spsa")] == ["spsa"]
    with pytest.raises(ConfigError, match="did you mean 'spsa'"):
        chosen(config, "spsb")


def test_the_table_has_a_column_for_each() -> None:
    one = estimate(MEASURED, 5, link_bytes_per_s=100_000, rtt_s=0.1, round_s=0, memory_bytes=10**10)
    lines = told([one], {"spsa": "no"}, 5, 100_000, 12.5e6, config_of(DECOUPLED), Path("a.toml")).splitlines()
    assert lines[0] == "run: 5 nodes like this machine, each with a link of 100.0 kB/s."
    assert "computing           2.4 s (2-2.8)" in lines
    assert "spsa cannot train this: no" in lines
    assert lines[-1].endswith("thinwire compare a.toml")
    assert not any("GPU" in line for line in lines)
    three = told([one] * 3, {}, 5, 100_000, 12.5e6, config_of(DECOUPLED), Path("a.toml")).splitlines()
    assert all(len(line) <= 80 for line in three[:-4])


def test_rates() -> None:
    assert parse_rate("10Mbit") == parse_rate("10Mbit/s") == 1_250_000
    with pytest.raises(ConfigError, match=r"^--link fast: write it as"):
        parse_rate("fast", "--link")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "[run]\nname = 'small'\n[task]\nlayers = 1\nwidth = 16\nheads = 2\ncontext = 16\nbatch = 2\n"
        "[strategy]\nname = 'spsa'\nlr = 1e-3\nprobes = 2\n"
    )
    args = [
        "plan",
        str(path),
        "--peers",
        "3",
        "--link",
        "1Gbit",
        "--strategies",
        "spsa",
        "--seconds",
        "0.1",
        "--rtt-ms",
        "0",
    ]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["peers"], found["link_bytes_per_s"]) == ("small", 3, 125_000_000)
    (spsa,) = found["strategies"]
    assert (spsa["strategy"], spsa["batches"], spsa["fits"]) == ("spsa", 2, True)
    assert spsa["compute_s"]["least"] <= spsa["compute_s"]["median"] <= spsa["compute_s"]["most"]
    for more, message in (
        (("--peers", "1"), "--peers 1: between 2 and 256"),
        (("--link", "fast"), "--link fast"),
        (("--set", "task.heads=3"), "not a multiple of task.heads"),
        (("--seconds", "0"), "--seconds: above 0"),
    ):
        assert main([*args, *more]) == 2
        assert message in capsys.readouterr().err
