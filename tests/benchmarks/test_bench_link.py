"""`bench link`: round trips of an exchange on a thin link. Times are no matter of pass or fail."""

from __future__ import annotations

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.node.bench.command import run_sizes
from thinwire.node.bench.network.link import measure_link, parse_rtt

ROUND_TRIP_S = 0.02

pytestmark = pytest.mark.swarm


def test_a_thin_link_takes_its_time() -> None:
    found = measure_link(1e5, ROUND_TRIP_S, 5000, n_peers=2, n_rounds=3)
    assert found["exchange_p50_s"] >= ROUND_TRIP_S + 2 * 5000 / 1e5, "there, and back to the other one"
    assert found["round_trips"] == pytest.approx(found["exchange_p50_s"] / ROUND_TRIP_S, abs=0.01)
    assert found["sent_bytes_per_peer_and_round"] >= 5000


def test_what_cannot_be_measured_is_refused() -> None:
    assert parse_rtt("50ms") == 0.05
    for text in ("50", "0.05s", "-1ms"):
        with pytest.raises(ConfigError, match="50ms"):
            parse_rtt(text)
    with pytest.raises(ConfigError, match="bench link"):
        run_sizes("round", None, 1, link=(1e6, 0.05))
