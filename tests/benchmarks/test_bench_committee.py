"""`bench round --seats N`: what three coordinators cost a node. Times are no matter of pass or fail."""

from __future__ import annotations

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.node.bench.command import run_bench, run_sizes
from thinwire.node.bench.network.committee import PAYLOADS, measure_seats

ROUND_TRIP_S = 0.02

pytestmark = pytest.mark.swarm


def test_a_seal_of_three_costs_a_node_90_bytes_of_ledger_and_a_round_trip() -> None:
    alone, three = (measure_seats(n, ROUND_TRIP_S, PAYLOADS["inline"], n_peers=2, n_rounds=5) for n in (1, 3))
    assert 0 < three["ledger_bytes_per_commit"] - alone["ledger_bytes_per_commit"] <= 90
    assert three["sent_bytes_per_peer_and_round"] <= 300
    assert alone["commit_p50_s"] >= ROUND_TRIP_S, "an offer's way and the commit's way back"
    assert three["commit_p50_s"] >= 2 * ROUND_TRIP_S, "and the way of the votes"
    assert three["commit_p50_s"] <= three["commit_p99_s"]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="between 1 and 7"):
        run_bench("round", None, 1, n_seats=8)
    with pytest.raises(ConfigError, match="bench round"):
        run_sizes("noise", None, 1, n_seats=3)
