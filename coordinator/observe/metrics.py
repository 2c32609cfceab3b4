"""The coordinator's Prometheus metrics: read from the server's status whenever somebody scrapes.

`thinwire_swarm_*` is about the run, `thinwire_coordinator_*` about this process, `thinwire_seat_*` about it
as one of several. What only the one that leads knows, only that one has. Nodes have names of their
own (`node.tracking.metrics`), so that no sum counts anything twice. No label names a peer: what is to be
known of one peer is at that peer's own target (`gateway`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..membership import Cause, PeerState
from ..protocol.exposition import build_info, text_of
from ..protocol.messages import Rejected
from ..rounds import Why
from .families import complete, counter, gauge, histogram, labelled
from .seat_metrics import seat_metrics

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
        yield from seat_metrics(status["seat"])
        if "since_start" not in status:  # a seat that has not got what the run needs
            return
        yield from _run(status)
        if status["seat"]["role"] == "leads":
            yield from _peers(status)
            yield from _offers(status)
            yield from _trust(status)
            yield from _since_start(status["since_start"])
        yield from _process(status)


def register(registry: CollectorRegistry, status: Callable[[], dict[str, Any]]) -> None:
    """Adds the coordinator's metrics to `registry`."""
    build_info(registry, "coordinator")
    registry.register(ServiceCollector(status))


def _run(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield gauge("swarm_round", "Newest committed round", status["round"])
    yield gauge("swarm_last_round", "The round that the run ends with", status["rounds"])
    is_paused = float(status["state"] == "paused")
    yield gauge("swarm_paused", "1 while the run's owner has paused it: no round is open then", is_paused)
    yield counter("swarm_commits", "Commits in the ledger, over all restarts", status["round"])
    if status["last_commit_ms"] is not None:
        yield gauge(
            "swarm_last_commit_timestamp_seconds",
            "When the newest commit was made, by this machine's clock: time() less this is its age",
            status["last_commit_ms"] / 1000,
        )
    unit = status.get("loss_unit", "nats")
    if status["loss"] is not None:
        yield gauge(
            "swarm_loss", f"Mean training loss of the offers in the newest commit, in {unit}", status["loss"]
        )
    if status["held_out"]:
        round_, loss = status["held_out"][-1]
        yield gauge("swarm_held_out_loss", f"Newest held-out loss, in {unit}", loss)
        if size := status.get("bytes_per_token"):
            yield gauge(
                "swarm_held_out_bits_per_byte", "The same in bits per byte of text", loss / math.log(2) / size
            )
        yield gauge("swarm_held_out_round", "The round after which it was measured", round_)
    if (samples := status.get("noise_scale", {}).get("samples")) is not None:
        yield gauge(
            "swarm_noise_scale_samples",
            "Samples of a round beyond which more help little, by the noise of peers' payloads",
            samples,
        )
    if status.get("snapshot"):
        yield gauge(
            "swarm_snapshot_round", "Round of the newest attested snapshot", status["snapshot"]["round"]
        )


def _peers(status: Mapping[str, Any]) -> Iterator[Metric]:
    n = Counter(peer["state"] for peer in status["peers"])
    states = {str(state): n[str(state)] for state in PeerState}
    yield labelled(GaugeMetricFamily, "swarm_peers", "Admitted peers by what they do", "state", states)


def _trust(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Of all peers together; each one's own is at its target, see `of_peer`."""
    peers = status["peers"]
    sizes = [peer["size"] for peer in peers if peer["size"] is not None and peer["state"] != "gone"]
    if sizes:
        yield gauge(
            "swarm_farthest_peer_ratio",
            "Norm of the recent payloads of the peer that has the largest ones, in medians of their rounds, "
            "as most nodes say",
            max(sizes),
        )
    yield gauge(
        "swarm_condemned_peers",
        "Peers that weigh nothing for now, because of failed audits",
        sum(peer["condemned_until"] is not None for peer in peers),
    )
    audits = {verdict: sum(peer[f"audits_{verdict}"] for peer in peers) for verdict in AUDITED}
    yield labelled(
        CounterMetricFamily, "swarm_audits", "Audits of offers, by how they ended", "result", audits
    )
    empty = sum(peer["offers_empty"] for peer in peers)
    yield counter("swarm_empty_offers", "Offers for which every batch of their node was dropped", empty)


class PeerCollector(Collector):
    """What the coordinator knows of one peer, for that peer's own target. `peer`: of the status."""

    def __init__(self, peer: Mapping[str, Any]) -> None:
        self._peer = peer

    def collect(self) -> Iterable[Metric]:
        peer = self._peer
        for name, words in _SIZES.items():
            if peer[name] is not None:
                yield gauge(f"peer_{name}_ratio", words, peer[name])
        yield gauge(
            "peer_condemned",
            "1 while this peer weighs nothing because of failed audits",
            float(peer["condemned_until"] is not None),
        )
        audits = {verdict: peer[f"audits_{verdict}"] for verdict in AUDITED}
        yield labelled(
            CounterMetricFamily,
            "peer_audits",
            "Audits of this peer's offers, by how they ended",
            "result",
            audits,
        )
        rejected = complete(peer["rejected"], get_args(Rejected))
        words = "What of this peer was not let in since the coordinator was started"
        yield labelled(CounterMetricFamily, "peer_rejected", words, "reason", rejected)
        offers = {
            "counted": peer["offers_counted"],
            "missed": peer["offers_missed"],
            "empty": peer["offers_empty"],
        }
        words = "This peer's offers: counted, awaited in vain, and those for which every batch was dropped"
        yield labelled(CounterMetricFamily, "peer_offers", words, "result", offers)


def with_trust(said: bytes, peer: Mapping[str, Any]) -> bytes:
    """A node's own metrics, and what is known of it here: about itself nobody is asked that."""
    own = [line for line in said.splitlines(keepends=True) if not _IS_OURS.match(line)]
    if own and not own[-1].endswith(b"\n"):
        own.append(b"\n")
    registry = CollectorRegistry()
    registry.register(PeerCollector(peer))
    return b"".join(own) + text_of(registry)


def _offers(status: Mapping[str, Any]) -> Iterator[Metric]:
    yield labelled(
        CounterMetricFamily,
        "swarm_offers",
        "Offers that were counted, and those that a round was closed without although they were awaited",
        "result",
        {
            "counted": sum(peer["offers_counted"] for peer in status["peers"]),
            "missed": sum(peer["offers_missed"] for peer in status["peers"]),
        },
    )
    yield counter("swarm_payload_bytes", "Bytes of all counted payloads, each once", status["payload_bytes"])
    payload, ddp = status["payload_bytes_per_peer_round"], status["ddp_bytes_per_peer_round"]
    if payload and ddp:
        yield gauge(
            "swarm_compression_ratio",
            "What an all-reduce of float32 gradients would send per peer and round, in payloads of the run",
            ddp / payload,
        )
    if (sent := status.get("sent_bytes_per_peer_round")) and ddp:
        yield gauge(
            "swarm_all_sent_ratio",
            "The same in all that peers send: payloads, framing, snapshots, control",
            ddp / sent,
        )
    yield counter(
        "swarm_fingerprint_mismatches",
        "Reported fingerprints that others differ from",
        status["mismatches"],
    )


def _since_start(since_start: Mapping[str, Any]) -> Iterator[Metric]:
    why = complete(since_start["closed"], get_args(Why))
    yield labelled(
        CounterMetricFamily, "swarm_rounds_closed", "Closed rounds by why they were", "reason", why
    )
    joined = complete(since_start["joined"], JOINED)
    yield labelled(CounterMetricFamily, "swarm_joins", "Sessions that were opened", "kind", joined)
    left = complete(since_start["left"], get_args(Cause))
    yield labelled(
        CounterMetricFamily, "swarm_leaves", "Peers that are gone, by how they went", "reason", left
    )
    yield histogram(
        "swarm_round_duration_seconds",
        "From the opening of a round to its commit",
        since_start["durations"],
        since_start["durations_s"],
    )


def _process(status: Mapping[str, Any]) -> Iterator[Metric]:
    rejected = complete(status["rejected"], get_args(Rejected))
    words = "What was not let in: frames, sessions, offers, reports"
    yield labelled(CounterMetricFamily, "coordinator_rejected", words, "reason", rejected)
    yield gauge("coordinator_ledger_bytes", "The ledger on the disk", status["ledger_bytes"])
    if status.get("disk_free_bytes") is not None:
        yield gauge(
            "coordinator_disk_free_bytes",
            "Room on the disk that has ledger and payloads",
            status["disk_free_bytes"],
        )
    if "payloads" in status:
        kept = status["payloads"]
        yield gauge("coordinator_kept_payload_bytes", "Payloads on the disk", kept["bytes"])
        if kept["quota_bytes"] is not None:
            yield gauge("coordinator_blob_quota_bytes", "What blobs may take there", kept["quota_bytes"])
    kinds = {"sent_bytes": "Bytes written to streams", "received_bytes": "Bytes read from streams"}
    for name, by_kind in status.get("coordinator", {}).items():
        yield labelled(CounterMetricFamily, f"coordinator_{name}", kinds[name], "kind", by_kind)
