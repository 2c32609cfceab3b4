"""What nodes tell the coordinator of themselves, for people."""

from __future__ import annotations

from thinwire.coordinator.protocol.messages import Phases
from thinwire.node.tracking.device_metrics import in_words
from thinwire.node.tracking.metrics import NodeMetrics


def test_phases_are_totals_of_rounds_that_a_node_took_part_in() -> None:
    metrics = NodeMetrics()
    assert metrics.phases() == Phases(rounds=0, compute_ms=0, pack_ms=0, exchange_ms=0, apply_ms=0)
    for _ in range(100):
        metrics.phase("apply", 5.0)  # while it catches up
    assert metrics.phases().rounds == 0
    for n in range(1, 4):
        metrics.phase("compute", 0.25)
        metrics.phase("pack", 0.125)
        metrics.phase("ahead", 9.0)  # during the exchange, not beside it
        metrics.phase("apply", 0.0005)
        metrics.phase("exchange", 1.0)
        assert metrics.phases() == Phases(
            rounds=n, compute_ms=250 * n, pack_ms=125 * n, exchange_ms=1000 * n, apply_ms=n // 2
        )


def test_a_cpu_in_words() -> None:
    words = in_words(["cpu"])
    assert words.endswith((" threads)", " (1 thread)"))
    assert len(words) <= 100
