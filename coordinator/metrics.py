"""The coordinator's Prometheus metrics: read from the service's status whenever somebody scrapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from thinwire.coordinator.membership import PeerState


class ServiceCollector(Collector):
    """`status` returns `Service.status()`, and a server's own bytes under "coordinator".

    It is called in the thread of the scrape.
    """

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not call `status`."""
        return []

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        yield GaugeMetricFamily("thinwire_round", "Newest committed round", value=status["round"])
        yield CounterMetricFamily("thinwire_commits", "Commits in the ledger", value=status["round"])
        yield _peers(status["peers"])
        yield SummaryMetricFamily(
            "thinwire_round_duration_seconds",
            "From the opening of a round to its commit",
            count_value=status["timed_rounds"],
            sum_value=status["timed_rounds_s"],
        )
        rejected = CounterMetricFamily("thinwire_rejected", "What was not let in", labels=["reason"])
        for reason, n in status["rejected"].items():
            rejected.add_metric([reason], n)
        yield rejected
        for name, by_kind in status.get("coordinator", {}).items():
            yield _by_kind(name, by_kind)
        if status.get("snapshot"):
            attested = status["snapshot"]["round"]
            yield GaugeMetricFamily("thinwire_snapshot_round", "Newest attested snapshot", value=attested)
        if "payloads" in status:
            n_bytes = status["payloads"]["bytes"]
            yield GaugeMetricFamily("thinwire_kept_payload_bytes", "Payloads on the disk", value=n_bytes)
        if status["held_out"]:
            loss = status["held_out"][-1][1]
            yield GaugeMetricFamily("thinwire_held_out_loss", "Newest held-out loss in nats", value=loss)


def _by_kind(name: str, by_kind: dict[str, int]) -> Metric:
    words = {"sent_bytes": "Bytes written to streams", "received_bytes": "Bytes read from streams"}
    family = CounterMetricFamily(f"thinwire_{name}", words[name], labels=["kind"])
    for kind, n_bytes in by_kind.items():
        family.add_metric([kind], n_bytes)
    return family


def _peers(peers: list[dict[str, Any]]) -> Metric:
    family = GaugeMetricFamily("thinwire_peers", "Admitted peers by what they do", labels=["state"])
    n = Counter(peer["state"] for peer in peers)
    for state in PeerState:
        family.add_metric([str(state)], n[str(state)])
    return family


def register(registry: CollectorRegistry, status: Callable[[], dict[str, Any]]) -> None:
    """Adds the coordinator's metrics to `registry`."""
    registry.register(ServiceCollector(status))
