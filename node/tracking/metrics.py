"""A node's Prometheus metrics. One registry per node, passed in; labels are bounded enums, and no label
names another peer: a node's series do not grow with its swarm."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ...compression.errors import BadReason
from ...coordinator.protocol.addresses import HttpAddress
from ...coordinator.protocol.exposition import BUCKETS_S, build_info, text_of
from ...coordinator.protocol.messages import PHASES, Gossiping, Phases
from ..links.base import PayloadRefused, Traffic
from .peer_sizes import PeerSizes

Phase = Literal["compute", "pack", "exchange", "apply", "ahead"]
NotCounted = Literal["late", "bad_payload", "given_up"]
"""The round closed without it; its payload did not pass the check; the replica was moved to another round."""

KINDS: Final = ("payload", "snapshot", "ledger", "control")

Dropped = Literal["batches", "probes", "rounds"]
"""What `Strategy.counters` calls dropped_batches, dropped_probes, dropped_rounds."""

Audited = Literal["passed", "failed", "skipped"]
"""What this node found of another peer's offer; skipped: it came too late, or could not tell."""

TrackerName = Literal["jsonl", "tensorboard", "wandb"]


class _Growth:
    """A counter that is told totals, by label: what they have grown by is counted."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._last: dict[str, int] = {}

    def update(self, totals: Mapping[str, int]) -> None:
        """A total that has fallen, as some do after a replay, counts nothing."""
        for label, now in totals.items():
            self._counter.labels(label).inc(max(0, now - self._last.get(label, 0)))
        self._last = dict(totals)


class _PhaseTimes:
    """How long the phases of a round take: the last time, in all, and for Prometheus."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        for phase in get_args(Phase):
            histogram.labels(phase)
        self._last_s: dict[str, float] = {}
        self._totals: tuple[float, ...] = (0.0,) * (1 + len(PHASES))
        """Rounds, then seconds of every phase of `PHASES`; replaced as a whole, read from any thread."""

    def took(self, phase: Phase, duration_s: float) -> None:
        self._histogram.labels(phase).observe(duration_s)
        self._last_s[phase] = duration_s
        if phase == "exchange":  # the last that becomes known of a round that this node took part in
            n_rounds, *totals = self._totals
            times = [self._last_s.get(part, 0.0) for part in PHASES]
            self._totals = (n_rounds + 1, *map(sum, zip(totals, times, strict=True)))

    def last_s(self) -> dict[str, float]:
        return {phase: self._last_s[phase] for phase in PHASES if phase in self._last_s}

    def totals(self) -> Phases:
        n_rounds, *totals = self._totals
        return Phases(
            rounds=int(n_rounds), **{f"{p}_ms": int(s * 1000) for p, s in zip(PHASES, totals, strict=True)}
        )


def _labelled(counter: Counter, values: Iterable[str]) -> Counter:
    """With all of its series, at zero."""
    for value in values:
        counter.labels(value)
    return counter


def _refused_payloads(counter: Callable[..., Counter]) -> _Growth:
    refused = counter(
        "thinwire_refused_payloads",
        "Payloads of others that this node did not take: not of the coordinator (sender), or unannounced; "
        "what it asked for was wrong, or so slow that it came from elsewhere",
        ["reason"],
    )
    return _Growth(_labelled(refused, get_args(PayloadRefused)))


IN_NATS: Final = "in nats per byte (text), token (of a tokenizer) or example (with labels)"


class NodeMetrics:
    """What a node counts in `registry`. `serve` answers scrapes; the coordinator asks for `text`.

    `sizes`: of the peers' payloads; no label names them, the coordinator has what all nodes say of each.
    """

    gossip_told: Callable[[], Gossiping | None] | None = None
    """Asked for what this node tells of its exchanges with neighbours."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        r = self.registry = registry or CollectorRegistry()
        gauge, counter = partial(Gauge, registry=r), partial(Counter, registry=r)
        histogram = partial(Histogram, registry=r, buckets=BUCKETS_S)
        build_info(r, "node")
        self._training = gauge("thinwire_training", "1 while this node takes part in rounds")
        self._round = gauge("thinwire_round", "Last round that this replica has applied")
        self._behind = gauge("thinwire_rounds_behind", "Committed rounds that this replica has not applied")
        self._loss = gauge("thinwire_loss", f"Mean training loss of the last local work, {IN_NATS}")
        self._held_out = gauge("thinwire_held_out_loss", f"Last held-out loss measured here, {IN_NATS}")
        evaluations = counter(
            "thinwire_evaluations",
            "Evaluations of the weights beside training, by how they ended",
            ["result"],
        )
        self._evaluations = _labelled(evaluations, ("ok", "failed", "skipped"))
        self._samples = counter("thinwire_samples", "Samples in own offers")
        self._tokens = counter("thinwire_tokens", "Tokens in own offers")
        self._batches = gauge("thinwire_batches", "Batches drawn for the last own payload")
        rounds = counter(
            "thinwire_rounds",
            "Applied rounds by what became of this node's offer; none: it had made none",
            ["result"],
        )
        self._rounds = _labelled(rounds, ("counted", "missed", "none"))
        not_counted = counter(
            "thinwire_offers_not_counted", "Own offers that did not count, by why", ["reason"]
        )
        self._not_counted = _labelled(not_counted, get_args(NotCounted))
        bad = counter(
            "thinwire_bad_payloads",
            "Counted payloads that were left out, by what is wrong with them; again when they are replayed",
            ["reason"],
        )
        self._bad = _Growth(_labelled(bad, get_args(BadReason)))
        self._refused = _refused_payloads(counter)
        dropped = counter(
            "thinwire_not_finite",
            "Local work that was thrown away because its loss or gradient was not finite",
            ["kind"],
        )
        self._dropped = _Growth(_labelled(dropped, get_args(Dropped)))
        self._payload = counter("thinwire_payload_bytes", "Bytes of own payloads, each once")
        self._ratio = gauge(
            "thinwire_compression_ratio",
            "What an all-reduce of float32 gradients would send per peer and round, in own payloads",
        )
        self._all_sent_ratio = gauge(
            "thinwire_all_sent_ratio",
            "The same in all that this node sends: payloads, framing, snapshots, control",
        )
        sent = counter("thinwire_sent_bytes", "Bytes written to streams", ["kind"])
        received = counter("thinwire_received_bytes", "Bytes read from streams", ["kind"])
        self._sent, self._received = (_Growth(_labelled(c, KINDS)) for c in (sent, received))
        self._duration = histogram(
            "thinwire_round_duration_seconds", "From one applied round to the next, while training"
        )
        phase = histogram(
            "thinwire_phase_duration_seconds",
            "Parts of a round: local work, packing, waiting for commit and payloads, applying; and what is "
            "worked ahead while waiting",
            ["phase"],
        )
        self._phases = _PhaseTimes(phase)
        self._checks = counter("thinwire_fingerprint_checks", "Fingerprints reported to be compared")
        heals = counter(
            "thinwire_heals",
            "Replays of the ledger because replicas differ: this one was wrong and is the replay's now, or "
            "it was confirmed",
            ["result"],
        )
        self._heals = _labelled(heals, ("adopted", "confirmed"))
        audits = counter(
            "thinwire_audits",
            "Other peers' work that this node has done again, by what it found; skipped: it could not tell",
            ["result"],
        )
        self._audits = _labelled(audits, get_args(Audited))
        self.sizes = PeerSizes()
        farthest = gauge(
            "thinwire_farthest_peer_ratio",
            "Norm of the recent payloads of the peer that has the largest ones, in medians of their rounds",
        )
        farthest.set_function(self.sizes.largest)
        clipped = gauge(
            "thinwire_clipped_payloads_ratio", "Share of all recent payloads that the bound scaled down"
        )
        clipped.set_function(self.sizes.clipped)
        self._limit = gauge(
            "thinwire_upload_limit_bytes_per_second",
            "What this node may send at most (--max-upload); +Inf: no limit",
        )
        self._used = gauge("thinwire_upload_used_ratio", "Part of that limit used in the last 10 s")
        self._disk_free = gauge("thinwire_disk_free_bytes", "Room on the disk that has this node's state")
        untracked = counter("thinwire_tracker_failures", "Records that a tracker could not take", ["kind"])
        self._untracked = _labelled(untracked, get_args(TrackerName))
        self._limit.set(math.inf)
        for unknown in (self._loss, self._held_out, self._ratio, self._disk_free):
            unknown.set(math.nan)
        self._is_training = False

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
        self._sent.update(traffic.sent)
        self._received.update(traffic.received)
        self._refused.update(traffic.refused)

    def proposed(
        self, loss: float | None, n_bytes: int, n_samples: int, n_tokens: int, n_batches: int
    ) -> None:
        if loss is not None:
            self._loss.set(loss)
        self._payload.inc(n_bytes)
        self._samples.inc(n_samples)
        self._tokens.inc(n_tokens)
        self._batches.set(n_batches)

    def compression(self, ratio: float, all_sent: float) -> None:
        """Bytes of data-parallel training for each byte of own payloads, and for each one sent."""
        self._ratio.set(ratio)
        self._all_sent_ratio.set(all_sent)

    def phase(self, phase: Phase, duration_s: float) -> None:
        """What a phase of this node's round took."""
        self._phases.took(phase, duration_s)

    def parts(self) -> dict[str, float]:
        """What each phase took the last time, in seconds."""
        return self._phases.last_s()

    def gossip(self) -> Gossiping | None:
        """What this node tells of its exchanges with neighbours; may be asked from any thread."""
        return None if self.gossip_told is None else self.gossip_told()

    def phases(self) -> Phases:
        """Totals of the rounds that this node took part in; may be asked from any thread."""
        return self._phases.totals()

    def result(self, result: Literal["counted", "missed", "none"], n_rounds: int = 1) -> None:
        self._rounds.labels(result).inc(n_rounds)

    def not_counted(self, why: NotCounted) -> None:
        self._not_counted.labels(why).inc()

    def bad_payloads(self, so_far: Mapping[str, int]) -> None:
        """Totals of the replica, by reason."""
        self._bad.update(so_far)

    def not_finite(self, counters: Mapping[str, int]) -> None:
        """Totals of the strategy (see `Dropped`); after a replay they may be lower than they were."""
        self._dropped.update({kind: counters.get(f"dropped_{kind}", 0) for kind in get_args(Dropped)})

    def held_out(self, loss: float) -> None:
        self._held_out.set(loss)

    def evaluated(self, result: Literal["ok", "failed", "skipped"]) -> None:
        """`skipped`: the one before it was still running."""
        self._evaluations.labels(result).inc()

    def fingerprint_reported(self) -> None:
        self._checks.inc()

    def audited(self, result: Audited) -> None:
        self._audits.labels(result).inc()

    def replayed(self, was_wrong: bool) -> None:
        """The ledger was replayed because replicas differ. `was_wrong`: this one was, and is the replay's
        now."""
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
