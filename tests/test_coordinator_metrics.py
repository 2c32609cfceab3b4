"""The coordinator's metrics, as a scrape shows them."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from thinwire.coordinator.metrics import register


def test_a_scrape_shows_the_status() -> None:
    status: dict[str, Any] = {
        "round": 7,
        "peers": [{"state": "training"}, {"state": "training"}, {"state": "gone"}],
        "timed_rounds": 3,
        "timed_rounds_s": 4.5,
        "rejected": {"late_offer": 2},
        "held_out": [[0, 5.5], [5, 2.5]],
    }
    registry = CollectorRegistry()
    register(registry, lambda: status)
    lines = generate_latest(registry).decode().splitlines()
    for line in (
        "thinwire_round 7.0",
        "thinwire_commits_total 7.0",
        'thinwire_peers{state="training"} 2.0',
        'thinwire_peers{state="joining"} 0.0',
        'thinwire_peers{state="gone"} 1.0',
        "thinwire_round_duration_seconds_count 3.0",
        "thinwire_round_duration_seconds_sum 4.5",
        'thinwire_rejected_total{reason="late_offer"} 2.0',
        "thinwire_held_out_loss 2.5",
    ):
        assert line in lines
    status["round"] = 8
    assert registry.get_sample_value("thinwire_round") == 8


def test_a_run_that_was_never_evaluated_shows_no_loss() -> None:
    registry = CollectorRegistry()
    empty = {
        "round": 0,
        "peers": [],
        "timed_rounds": 0,
        "timed_rounds_s": 0.0,
        "rejected": {},
        "held_out": [],
    }
    register(registry, lambda: empty)
    assert registry.get_sample_value("thinwire_held_out_loss") is None
    assert registry.get_sample_value("thinwire_commits_total") == 0
