"""A node's Prometheus metrics. One registry per node, passed in; labels are bounded enums, and no label
names another peer: a node's series do not grow with its swarm."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ...compression.errors import BadReason
from ...coordinator.protocol.addresses import HttpAddress
from ...coordinator.protocol.exposition import BUCKETS_S, build_info, text_of
from ...coordinator.protocol.messages import PHASES, Phases
from ..links.base import Traffic

Phase = Literal["compute", "pack", "exchange", "apply", "ahead"]
NotCounted = Literal["late", "bad_payload", "given_up"]
"""The round closed without it; its payload did not pass the check; the replica was moved to another round."""

KINDS: Final = ("payload", "snapshot", "ledger", "control")

Dropped = Literal["batches", "probes", "rounds"]
"""What `Strategy.counters` calls dropped_batches, dropped_probes, dropped_rounds."""

TrackerName = Literal["jsonl", "tensorboard", "wandb"]


class NodeMetrics:
    """What a node counts in `registry`. `serve` answers scrapes; the coordinator asks for `text`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        r = self.registry = registry or CollectorRegistry()
        build_info(r, "node")
        self._training = Gauge("thinwire_training", "1 while this node takes part in rounds", registry=r)
        self._round = Gauge("thinwire_round", "Last round that this replica has applied", registry=r)
        self._behind = Gauge(
            "thinwire_rounds_behind", "Committed rounds that this replica has not applied", registry=r
        )
        self._loss = Gauge("thinwire_loss", "Mean training loss of the last local work, in nats", registry=r)
        self._held_out = Gauge(
            "thinwire_held_out_loss", "Last held-out loss measured here, in nats", registry=r
        )
        self._samples = Counter("thinwire_samples", "Samples in own offers", registry=r)
        self._tokens = Counter("thinwire_tokens", "Tokens in own offers", registry=r)
        self._batches = Gauge("thinwire_batches", "Batches drawn for the last own payload", registry=r)
        self._rounds = Counter(
            "thinwire_rounds",
            "Applied rounds by what became of this node's offer; none: it had made none",
            ["result"],
            registry=r,
        )
        self._not_counted = Counter(
            "thinwire_offers_not_counted", "Own offers that did not count, by why", ["reason"], registry=r
        )
        self._bad = Counter(
            "thinwire_bad_payloads",
            "Counted payloads that were left out, by what is wrong with them; again when they are replayed",
            ["reason"],
            registry=r,
        )
        self._dropped = Counter(
            "thinwire_not_finite",
            "Local work that was thrown away because its loss or gradient was not finite",
            ["kind"],
            registry=r,
        )
        self._payload = Counter("thinwire_payload_bytes", "Bytes of own payloads, each once", registry=r)
        self._ratio = Gauge(
            "thinwire_compression_ratio",
            "What an all-reduce of float32 gradients would send per peer and round, in own payloads",
            registry=r,
        )
        self._sent = Counter("thinwire_sent_bytes", "Bytes written to streams", ["kind"], registry=r)
        self._received = Counter("thinwire_received_bytes", "Bytes read from streams", ["kind"], registry=r)
        self._duration = Histogram(
            "thinwire_round_duration_seconds",
            "From one applied round to the next, while training",
            registry=r,
            buckets=BUCKETS_S,
        )
        self._phase = Histogram(
            "thinwire_phase_duration_seconds",
            "Parts of a round: local work, packing, waiting for commit and payloads, applying; and what is "
            "worked ahead while waiting",
            ["phase"],
            registry=r,
            buckets=BUCKETS_S,
        )
        self._checks = Counter(
            "thinwire_fingerprint_checks", "Fingerprints reported to be compared", registry=r
        )
        self._heals = Counter(
            "thinwire_heals",
            "Replays of the ledger because replicas differ: this one was wrong and is the replay's now, or "
            "it was confirmed",
            ["result"],
            registry=r,
        )
        self._limit = Gauge(
            "thinwire_upload_limit_bytes_per_second",
            "What this node may send at most (--max-upload); +Inf: no limit",
            registry=r,
        )
        self._used = Gauge(
            "thinwire_upload_used_ratio", "Part of that limit used in the last 10 s", registry=r
        )
        self._disk_free = Gauge(
            "thinwire_disk_free_bytes", "Room on the disk that has this node's state", registry=r
        )
        self._untracked = Counter(
            "thinwire_tracker_failures", "Records that a tracker could not take", ["kind"], registry=r
        )
        self._limit.set(math.inf)
        for gauge in (self._loss, self._held_out, self._ratio, self._disk_free):
            gauge.set(math.nan)
        self._last = Traffic({}, {})
        self._parts: dict[str, float] = {}
        self._timed: tuple[float, ...] = (0.0,) * (1 + len(PHASES))
        self._last_bad: dict[str, int] = {}
        self._last_dropped: dict[str, int] = {}
        self._is_training = False
        for counter, values in (
            (self._rounds, ("counted", "missed", "none")),
            (self._not_counted, get_args(NotCounted)),
            (self._bad, get_args(BadReason)),
            (self._sent, KINDS),
            (self._received, KINDS),
            (self._heals, ("adopted", "confirmed")),
            (self._dropped, get_args(Dropped)),
            (self._untracked, get_args(TrackerName)),
        ):
            for value in values:
                counter.labels(value)
        for phase in get_args(Phase):
            self._phase.labels(phase)

    @property
    def is_training(self) -> bool:
        """Whether this node takes part in rounds; may be asked from any thread."""
        return self._is_training

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return text_of(self.registry)

    def training(self, is_training: bool) -> None:
        self._is_training = is_training
        self._training.set(is_training)

    def behind(self, n_rounds: Callable[[], float]) -> None:
        """`n_rounds` is asked whenever somebody looks."""
        self._behind.set_function(n_rounds)

    def round(self, round: int, duration_s: float | None) -> None:
        """`duration_s`: None while catching up, where it says nothing about the swarm."""
        self._round.set(round)
        if duration_s is not None:
            self._duration.observe(duration_s)

    def traffic(self, traffic: Traffic) -> None:
        """Totals so far."""
        for counter, now, last in (
            (self._sent, traffic.sent, self._last.sent),
            (self._received, traffic.received, self._last.received),
        ):
            for kind, n_bytes in now.items():
                counter.labels(kind).inc(n_bytes - last.get(kind, 0))
        self._last = traffic

    def proposed(
        self, loss: float | None, n_bytes: int, n_samples: int, n_tokens: int, n_batches: int
    ) -> None:
        if loss is not None:
            self._loss.set(loss)
        self._payload.inc(n_bytes)
        self._samples.inc(n_samples)
        self._tokens.inc(n_tokens)
        self._batches.set(n_batches)

    def compression(self, ratio: float) -> None:
        self._ratio.set(ratio)

    def phase(self, phase: Phase, duration_s: float) -> None:
        self._phase.labels(phase).observe(duration_s)
        self._parts[phase] = duration_s
        if phase == "exchange":  # the last that becomes known of a round that this node took part in
            n_rounds, *totals = self._timed
            times = (self._parts.get(part, 0.0) for part in PHASES)
            self._timed = (n_rounds + 1, *(total + s for total, s in zip(totals, times, strict=True)))

    def parts(self) -> dict[str, float]:
        """What each phase took the last time, in seconds."""
        return {phase: self._parts[phase] for phase in PHASES if phase in self._parts}

    def phases(self) -> Phases:
        """Totals of the rounds that this node took part in; may be asked from any thread."""
        n_rounds, *totals = self._timed
        return Phases(
            rounds=int(n_rounds), **{f"{p}_ms": int(s * 1000) for p, s in zip(PHASES, totals, strict=True)}
        )

    def result(self, result: Literal["counted", "missed", "none"], n_rounds: int = 1) -> None:
        self._rounds.labels(result).inc(n_rounds)

    def not_counted(self, why: NotCounted) -> None:
        self._not_counted.labels(why).inc()

    def bad_payloads(self, so_far: Mapping[str, int]) -> None:
        """Totals of the replica."""
        for reason, n in so_far.items():
            self._bad.labels(reason).inc(n - self._last_bad.get(reason, 0))
        self._last_bad = dict(so_far)

    def not_finite(self, counters: Mapping[str, int]) -> None:
        """Totals of the strategy; after a replay they may be lower than they were."""
        for kind in get_args(Dropped):
            now = counters.get(f"dropped_{kind}", 0)
            self._dropped.labels(kind).inc(max(0, now - self._last_dropped.get(kind, 0)))
            self._last_dropped[kind] = now

    def held_out(self, loss: float) -> None:
        self._held_out.set(loss)

    def fingerprint_reported(self) -> None:
        self._checks.inc()

    def replayed(self, was_wrong: bool) -> None:
        self._heals.labels("adopted" if was_wrong else "confirmed").inc()

    def upload_limit(self, rate_bytes_per_s: float, used_ratio: Callable[[], float]) -> None:
        """`used_ratio`: the part of it used lately, asked whenever somebody looks."""
        self._limit.set(rate_bytes_per_s)
        self._used.set_function(used_ratio)

    def disk(self, folder: Path) -> None:
        """Where this node's state is."""
        self._disk_free.set_function(lambda: _free_bytes(folder))

    def not_tracked(self, tracker: TrackerName) -> None:
        self._untracked.labels(tracker).inc()


def _free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.nan


@contextmanager
def serve(metrics: NodeMetrics, address: HttpAddress | None) -> Iterator[None]:
    """Serves /metrics, /healthz and /readyz meanwhile; None: nowhere. Raises ConfigError for a taken port."""
    if address is None:
        yield
        return
    from ...coordinator.protocol.web import metrics_routes, serve_http

    with serve_http(metrics_routes(metrics.registry, lambda: metrics.is_training), address):
        yield
