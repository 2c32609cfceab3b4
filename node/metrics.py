"""A node's Prometheus metrics. One registry per node, passed in; labels are bounded enums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from thinwire.compression.errors import ConfigError
from thinwire.node.link import Traffic
from thinwire.optim.base import Own

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class NodeMetrics:
    """What a node counts; `registry` is served by `prometheus_client.start_http_server`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        r = self.registry = registry or CollectorRegistry()
        self._round = Gauge("thinwire_round", "Last round that this replica has applied", registry=r)
        self._loss = Gauge("thinwire_loss", "Mean training loss of the last local work", registry=r)
        self._held_out = Gauge("thinwire_held_out_loss", "Last held-out loss measured here", registry=r)
        self._offers = Counter("thinwire_offers", "Own offers by result", ["result"], registry=r)
        self._payload = Counter("thinwire_payload_bytes", "Bytes of own payloads, each once", registry=r)
        self._sent = Counter("thinwire_sent_bytes", "Bytes written to streams", ["kind"], registry=r)
        self._received = Counter("thinwire_received_bytes", "Bytes read from streams", ["kind"], registry=r)
        self._batches = Gauge("thinwire_batches", "Batches drawn for the last own payload", registry=r)
        self._duration = Histogram(
            "thinwire_round_duration_seconds", "From one commit to the next", registry=r, buckets=BUCKETS_S
        )
        self._phase = Histogram(
            "thinwire_phase_duration_seconds", "Parts of a round", ["phase"], registry=r, buckets=BUCKETS_S
        )
        self._last = Traffic({}, {})

    def round(self, round: int, duration_s: float, traffic: Traffic) -> None:
        self._round.set(round)
        self._duration.observe(duration_s)
        for counter, now, last in (
            (self._sent, traffic.sent, self._last.sent),
            (self._received, traffic.received, self._last.received),
        ):
            for kind, n_bytes in now.items():
                counter.labels(kind=kind).inc(n_bytes - last.get(kind, 0))
        self._last = traffic

    def proposed(self, loss: float | None, n_bytes: int, duration_s: float) -> None:
        if loss is not None:
            self._loss.set(loss)
        self._payload.inc(n_bytes)
        self._phase.labels(phase="propose").observe(duration_s)

    def worked_ahead(self, duration_s: float) -> None:
        self._phase.labels(phase="ahead").observe(duration_s)

    def batches(self, n: int) -> None:
        self._batches.set(n)

    def applied(self, own: Own, duration_s: float) -> None:
        if own is not None:
            self._offers.labels(result=own).inc()
        self._phase.labels(phase="apply").observe(duration_s)

    def upload_limit(self, rate_bytes_per_s: float, used_ratio: Callable[[], float]) -> None:
        """`used_ratio`: the part of it used lately, asked whenever somebody looks."""
        r = self.registry
        limit = "thinwire_upload_limit_bytes_per_second"
        Gauge(limit, "What this node may send at most (--max-upload)", registry=r).set(rate_bytes_per_s)
        used = Gauge("thinwire_upload_used_ratio", "Part of that limit used in the last 10 s", registry=r)
        used.set_function(used_ratio)

    def held_out(self, loss: float) -> None:
        self._held_out.set(loss)


@contextmanager
def serve(registry: CollectorRegistry, address: tuple[str, int] | None) -> Iterator[None]:
    """Serves /metrics at (host, port) meanwhile; None: nowhere. Raises ConfigError for a taken port."""
    if address is None:
        yield
        return
    host, port = address
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as e:
        raise ConfigError(f"--http {host}:{port}: {e.strerror}; choose another port") from e
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
