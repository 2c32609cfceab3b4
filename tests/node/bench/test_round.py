"""The benchmark of rounds runs, and a round without compute takes no more than it should."""

from __future__ import annotations

import pytest

from thinwire.node.bench.round import PAYLOAD_BYTES, measure_rounds


@pytest.mark.swarm
@pytest.mark.usefixtures("own_temp_folder")
def test_rounds_are_quick_and_small() -> None:
    result = measure_rounds(n_peers=3, n_rounds=20)
    assert (result["peers"], result["rounds"]) == (3, 20)
    assert 0 < result["round_p50_s"] <= result["round_p99_s"] <= result["round_max_s"]
    assert result["round_p50_s"] < 0.5  # 6 ms where this was written; far below the seconds of a timeout
    assert PAYLOAD_BYTES < result["sent_bytes_per_peer_and_round"] < 300
