"""The coordinator's Prometheus metrics: read from the server's status whenever somebody scrapes.

`thinwire_swarm_*` is about the run, `thinwire_coordinator_*` about this process. Nodes have names of their
own (`node.tracking.metrics`), so that no sum counts anything twice. No label names a peer: what is to be
known of one peer is at that peer's own target (`gateway`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from ..membership import Cause, PeerState
from ..protocol.exposition import BUCKETS_S, build_info, text_of
from ..protocol.messages import Rejected
from ..rounds import Why

JOINED = ("new", "returned")
AUDITED = ("passed", "failed")
_IS_OURS = re.compile(rb"(# (HELP|TYPE|UNIT) )?\s*thinwire_peer_")
_SIZES = {
    "size": "Norm of this peer's recent payloads in medians of their rounds, as most nodes say",
    "clipped": "Share of this peer's recent payloads that the bound scaled down, as most nodes say",
}


class ServiceCollector(Collector):
    """`status` returns `CoordinatorServer.status()`. It is called in the thread of the scrape."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not call `status`."""
        return []

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        yield from _run(status)
        yield from _offers(status)
        yield from _trust(status)
        yield from _since_start(status["since_start"])
        yield from _process(status)


def register(registry: CollectorRegistry, status: Callable[[], dict[str, Any]]) -> None:
    """Adds the coordinator's metrics to `registry`."""
    build_info(registry, "coordinator")
    registry.register(ServiceCollector(status))


def _run(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("swarm_round", "Newest committed round", status["round"])
    yield _gauge("swarm_last_round", "The round that the run ends with", status["rounds"])
    is_paused = float(status["state"] == "paused")
    yield _gauge("swarm_paused", "1 while the run's owner has paused it: no round is open then", is_paused)
    yield _counter("swarm_commits", "Commits in the ledger, over all restarts", status["round"])
    if status["last_commit_ms"] is not None:
        yield _gauge(
            "swarm_last_commit_timestamp_seconds",
            "When the newest commit was made, by this machine's clock: time() less this is its age",
            status["last_commit_ms"] / 1000,
        )
    unit = status.get("loss_unit", "nats")
    if status["loss"] is not None:
        yield _gauge(
            "swarm_loss", f"Mean training loss of the offers in the newest commit, in {unit}", status["loss"]
        )
    if status["held_out"]:
        round_, loss = status["held_out"][-1]
        yield _gauge("swarm_held_out_loss", f"Newest held-out loss, in {unit}", loss)
        if size := status.get("bytes_per_token"):
            yield _gauge(
                "swarm_held_out_bits_per_byte", "The same in bits per byte of text", loss / math.log(2) / size
            )
        yield _gauge("swarm_held_out_round", "The round after which it was measured", round_)
    if status.get("snapshot"):
        yield _gauge(
            "swarm_snapshot_round", "Round of the newest attested snapshot", status["snapshot"]["round"]
        )
    n = Counter(peer["state"] for peer in status["peers"])
    states = {str(state): n[str(state)] for state in PeerState}
    yield _labelled(GaugeMetricFamily, "swarm_peers", "Admitted peers by what they do", "state", states)


def _trust(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Of all peers together; each one's own is at its target, see `of_peer`."""
    peers = status["peers"]
    sizes = [peer["size"] for peer in peers if peer["size"] is not None and peer["state"] != "gone"]
    if sizes:
        yield _gauge(
            "swarm_farthest_peer_ratio",
            "Norm of the recent payloads of the peer that has the largest ones, in medians of their rounds, "
            "as most nodes say",
            max(sizes),
        )
    yield _gauge(
        "swarm_condemned_peers",
        "Peers that weigh nothing for now, because of failed audits",
        sum(peer["condemned_until"] is not None for peer in peers),
    )
    audits = {verdict: sum(peer[f"audits_{verdict}"] for peer in peers) for verdict in AUDITED}
    yield _labelled(
        CounterMetricFamily, "swarm_audits", "Audits of offers, by how they ended", "result", audits
    )
    empty = sum(peer["offers_empty"] for peer in peers)
    yield _counter("swarm_empty_offers", "Offers for which every batch of their node was dropped", empty)


class PeerCollector(Collector):
    """What the coordinator knows of one peer, for that peer's own target. `peer`: of the status."""

    def __init__(self, peer: Mapping[str, Any]) -> None:
        self._peer = peer

    def collect(self) -> Iterable[Metric]:
        peer = self._peer
        for name, words in _SIZES.items():
            if peer[name] is not None:
                yield _gauge(f"peer_{name}_ratio", words, peer[name])
        yield _gauge(
            "peer_condemned",
            "1 while this peer weighs nothing because of failed audits",
            float(peer["condemned_until"] is not None),
        )
        audits = {verdict: peer[f"audits_{verdict}"] for verdict in AUDITED}
        yield _labelled(
            CounterMetricFamily,
            "peer_audits",
            "Audits of this peer's offers, by how they ended",
            "result",
            audits,
        )
        rejected = _complete(peer["rejected"], get_args(Rejected))
        words = "What of this peer was not let in since the coordinator was started"
        yield _labelled(CounterMetricFamily, "peer_rejected", words, "reason", rejected)
        offers = {
            "counted": peer["offers_counted"],
            "missed": peer["offers_missed"],
            "empty": peer["offers_empty"],
        }
        words = "This peer's offers: counted, awaited in vain, and those for which every batch was dropped"
        yield _labelled(CounterMetricFamily, "peer_offers", words, "result", offers)


def with_trust(said: bytes, peer: Mapping[str, Any]) -> bytes:
    """A node's own metrics, and what is known of it here: about itself nobody is asked that."""
    own = [line for line in said.splitlines(keepends=True) if not _IS_OURS.match(line)]
    if own and not own[-1].endswith(b"\n"):
        own.append(b"\n")
    registry = CollectorRegistry()
    registry.register(PeerCollector(peer))
    return b"".join(own) + text_of(registry)


def _offers(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield _labelled(
        CounterMetricFamily,
        "swarm_offers",
        "Offers that were counted, and those that a round was closed without although they were awaited",
        "result",
        {
            "counted": sum(peer["offers_counted"] for peer in status["peers"]),
            "missed": sum(peer["offers_missed"] for peer in status["peers"]),
        },
    )
    yield _counter("swarm_payload_bytes", "Bytes of all counted payloads, each once", status["payload_bytes"])
    payload, ddp = status["payload_bytes_per_peer_round"], status["ddp_bytes_per_peer_round"]
    if payload and ddp:
        yield _gauge(
            "swarm_compression_ratio",
            "What an all-reduce of float32 gradients would send per peer and round, in payloads of the run",
            ddp / payload,
        )
    if (sent := status.get("sent_bytes_per_peer_round")) and ddp:
        yield _gauge(
            "swarm_all_sent_ratio",
            "The same in all that peers send: payloads, framing, snapshots, control",
            ddp / sent,
        )
    yield _counter(
        "swarm_fingerprint_mismatches",
        "Reported fingerprints that others differ from",
        status["mismatches"],
    )


def _since_start(since_start: Mapping[str, Any]) -> Iterator[Metric]:
    why = _complete(since_start["closed"], get_args(Why))
    yield _labelled(
        CounterMetricFamily, "swarm_rounds_closed", "Closed rounds by why they were", "reason", why
    )
    joined = _complete(since_start["joined"], JOINED)
    yield _labelled(CounterMetricFamily, "swarm_joins", "Sessions that were opened", "kind", joined)
    left = _complete(since_start["left"], get_args(Cause))
    yield _labelled(
        CounterMetricFamily, "swarm_leaves", "Peers that are gone, by how they went", "reason", left
    )
    bounds = [*map(str, BUCKETS_S), "+Inf"]
    yield HistogramMetricFamily(
        "thinwire_swarm_round_duration_seconds",
        "From the opening of a round to its commit",
        buckets=list(zip(bounds, accumulate(since_start["durations"]), strict=True)),
        sum_value=since_start["durations_s"],
    )


def _process(status: Mapping[str, Any]) -> Iterator[Metric]:
    rejected = _complete(status["rejected"], get_args(Rejected))
    words = "What was not let in: frames, sessions, offers, reports"
    yield _labelled(CounterMetricFamily, "coordinator_rejected", words, "reason", rejected)
    yield _gauge("coordinator_ledger_bytes", "The ledger on the disk", status["ledger_bytes"])
    if status.get("disk_free_bytes") is not None:
        yield _gauge(
            "coordinator_disk_free_bytes",
            "Room on the disk that has ledger and payloads",
            status["disk_free_bytes"],
        )
    if "payloads" in status:
        kept = status["payloads"]
        yield _gauge("coordinator_kept_payload_bytes", "Payloads on the disk", kept["bytes"])
        if kept["quota_bytes"] is not None:
            yield _gauge("coordinator_blob_quota_bytes", "What blobs may take there", kept["quota_bytes"])
    kinds = {"sent_bytes": "Bytes written to streams", "received_bytes": "Bytes read from streams"}
    for name, by_kind in status.get("coordinator", {}).items():
        yield _labelled(CounterMetricFamily, f"coordinator_{name}", kinds[name], "kind", by_kind)


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(f"thinwire_{name}", words, value=value)


def _counter(name: str, words: str, value: float) -> Metric:
    return CounterMetricFamily(f"thinwire_{name}", words, value=value)


def _labelled(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    words: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    family = kind(f"thinwire_{name}", words, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _complete(counts: Mapping[str, int], keys: Sequence[str]) -> dict[str, int]:
    """With a zero for what has not happened yet, so that its first time is seen as a rise."""
    return {key: counts.get(key, 0) for key in keys}
