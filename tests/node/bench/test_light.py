"""`bench peers --light`: many peers in few processes, with the real coordinator in one of its own."""

from __future__ import annotations

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.node.bench.command import run_sizes
from thinwire.node.bench.light.swarm import WARM_UP, bench_light


@pytest.mark.swarm
def test_every_light_peer_counts_in_every_round_and_none_is_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (found,) = bench_light([24], 12).values()
    assert (found["peers"], found["least_counted"], found["lost_sessions"]) == (24, 24, 0)
    assert found["rounds"] >= 4, "some go by between two looks"
    assert "24 peers: " in capsys.readouterr().err
    assert found["peak_bytes"] < 200 * 10**6, "torch is not in it, nor what this process has"
    assert found["loop_cpu_ms_per_round_and_peer"] > 0
    a_list_for_each = 24 * 24 * 120
    commits = 24 * (WARM_UP + 12) * 24 * 60
    assert found["received_bytes_in_all"] < commits + 2 * a_list_for_each


def test_light_peers_are_of_one_benchmark_and_as_many_as_a_run_may_have() -> None:
    with pytest.raises(ConfigError, match="between 1 and 1024 peers"):
        bench_light([2000], 1)
    with pytest.raises(ConfigError, match="--light: of `bench peers` only"):
        run_sizes("round", None, 1, light=[8])
