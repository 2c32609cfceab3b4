"""What people want to know of a run: counts and figures gathered from commits, reports and heartbeats."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Final

from ..protocol.figures import ddp_bytes, mean_loss
from ..protocol.messages import CommitBody, Heartbeat, NoiseEntry

log = logging.getLogger("thinwire.coordinator")

KEPT_TRAFFIC: Final = 1024
"""Peers whose traffic outlives the coordinator: those that sent most."""

KEPT_FINGERPRINTS = 64
"""Reported rounds that are remembered."""

RECENT_ROUNDS = 16

RECENT_NOISES: Final = 32
FEWEST_NOISES: Final = 3
"""Rounds whose payloads were looked at: a noise scale is a quotient of means over as many."""


@dataclass(slots=True)
class PeerFigures:
    """What one peer has done so far; byte counts are its own, over all its restarts that were heard of.

    `offers_empty`: counted ones for which all of its batches were dropped; those are in no other count."""

    offers_counted: int = 0
    offers_missed: int = 0
    offers_empty: int = 0
    missed_in_a_row: int = 0
    fingerprint: bytes | None = None
    fingerprint_round: int | None = None
    loss: float | None = None
    round: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    payload_bytes: int = 0

    def figures(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "fingerprint": None if self.fingerprint is None else self.fingerprint.hex()}


@dataclass(slots=True)
class RunStatistics:
    """Mutable figures of one run; rebuilt from the ledger after a restart."""

    n_params: int
    peers: dict[int, PeerFigures] = field(default_factory=dict)
    mismatches: int = 0
    loss: float | None = None
    last_commit_ms: int | None = None
    n_commits: int = 0
    n_offers: int = 0
    payload_bytes: int = 0
    total_duration_s: float = 0.0
    n_durations: int = 0
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_ROUNDS))
    _beats: dict[int, Heartbeat] = field(default_factory=dict)
    noises: dict[int, NoiseEntry] = field(default_factory=dict)
    """The newest ones, by round."""
    _fingerprints: dict[int, dict[int, bytes]] = field(default_factory=dict)
    """Round -> peer -> the last one that it reported."""

    def peer(self, index: int) -> PeerFigures:
        """Those of the peer with this index, made at the first call."""
        return self.peers.setdefault(index, PeerFigures())

    def has_offered(self, index: int) -> bool:
        """Whether an offer of the peer's was counted, or awaited in vain."""
        peer = self.peers.get(index)
        return peer is not None and peer.offers_counted + peer.offers_missed > 0

    def committed(self, body: CommitBody) -> None:
        """The next commit, live or while the ledger is read."""
        self.loss = mean_loss(body) if body.offers else self.loss
        self.last_commit_ms = body.time_ms
        self.n_commits += bool(body.offers)
        self.n_offers += len(body.offers)
        for offer in body.offers:
            self.payload_bytes += offer.n_bytes
            peer = self.peer(offer.peer)
            peer.offers_counted += offer.loss is not None
            peer.offers_empty += offer.loss is None
            peer.missed_in_a_row = 0
            peer.loss = offer.loss

    def round_closed(self, duration_s: float, missing: Iterable[int]) -> None:
        """`missing`: peers that were awaited until the round closed without them."""
        self.durations_s.append(duration_s)
        self.total_duration_s += duration_s
        self.n_durations += 1
        for index in missing:
            self.peer(index).offers_missed += 1
            self.peer(index).missed_in_a_row += 1

    def restore_durations(self, recent_s: Iterable[float], n_rounds: int, total_s: float) -> None:
        """Of rounds that another coordinator closed, in the place of those known here."""
        self.durations_s.clear()
        self.durations_s.extend(recent_s)
        self.n_durations, self.total_duration_s = n_rounds, total_s

    def figures(self) -> dict[str, Any]:
        """JSON-able, of the run as a whole; each peer has its own."""
        return {
            "loss": self.loss,
            "round_s": self.round_s,
            "last_commit_ms": self.last_commit_ms,
            "timed_rounds": self.n_durations,
            "timed_rounds_s": self.total_duration_s,
            "payload_bytes": self.payload_bytes,
            "payload_bytes_per_peer_round": self.payload_bytes_per_offer,
            "sent_bytes_per_peer_round": self.sent_bytes_per_peer_round,
            "mismatches": self.mismatches,
            "n_params": self.n_params,
            "ddp_bytes_per_peer_round": self.ddp_bytes_per_peer_round,
        }

    def heartbeat(self, index: int, beat: Heartbeat) -> None:
        """Adds what a peer has sent and received since its last heartbeat."""
        peer, last = self.peer(index), self._beats.get(index)
        if last is None or beat.sent_bytes < last.sent_bytes:
            last = Heartbeat(round=0, sent_bytes=0, received_bytes=0, payload_bytes=0)  # it starts counting
        peer.round, self._beats[index] = beat.round, beat
        peer.sent_bytes += beat.sent_bytes - last.sent_bytes
        peer.received_bytes += max(0, beat.received_bytes - last.received_bytes)
        peer.payload_bytes += max(0, beat.payload_bytes - last.payload_bytes)

    def saved_traffic(self) -> list[list[int]]:
        """What no ledger tells of peers: their bytes, missed offers and last heartbeats. For
        `restore_traffic`."""
        heard = sorted(self._beats, key=lambda index: -self.peer(index).sent_bytes)[:KEPT_TRAFFIC]
        rows = []
        for index in heard:
            peer, beat = self.peer(index), self._beats[index]
            totals = (peer.sent_bytes, peer.received_bytes, peer.payload_bytes, peer.offers_missed)
            rows.append(
                [index, *totals, beat.round, beat.sent_bytes, beat.received_bytes, beat.payload_bytes]
            )
        return rows

    def restore_traffic(self, rows: list[Any]) -> None:
        """So that what was sent and what was counted go on together; bad rows cost their figures."""
        for row in rows[:KEPT_TRAFFIC]:
            try:
                index, sent, received, payload, missed, *beat = (_count(x) for x in row)
                round_, beat_sent, beat_received, beat_payload = beat
                last = Heartbeat(
                    round=round_,
                    sent_bytes=beat_sent,
                    received_bytes=beat_received,
                    payload_bytes=beat_payload,
                )
            except (TypeError, ValueError) as e:
                log.warning("a peer's traffic before the restart cannot be read: %s", e)
                continue
            peer, self._beats[index] = self.peer(index), last
            peer.sent_bytes, peer.received_bytes, peer.payload_bytes = sent, received, payload
            peer.offers_missed = missed

    def noise(self, round_: int, found: NoiseEntry) -> None:
        """What the evaluator of that round has found."""
        self.noises[round_] = found
        for old in sorted(self.noises)[:-RECENT_NOISES]:
            del self.noises[old]

    def noise_scale(self) -> dict[str, Any]:
        """JSON-able. `samples`: of a round, beyond which more of them help little; `peers`: so many offers
        have that; None: not known yet, or the payloads of `rounds` rounds share nothing that can be told from
        noise. `of`: see NoiseEntry."""
        found = list(self.noises.values())
        if not found:
            return {"samples": None, "peers": None, "rounds": 0, "of": None}
        signal, noise, n = (
            sum(getattr(x, name) for x in found) / len(found) for name in ("signal", "noise", "n_samples")
        )
        is_known = len(found) >= FEWEST_NOISES and signal > 0.0
        samples = max(0.0, noise / signal) if is_known else None
        peers = None if samples is None else samples / n
        return {"samples": samples, "peers": peers, "rounds": len(found), "of": found[-1].of}

    def fingerprint(self, index: int, round_: int, value: bytes) -> set[int]:
        """Notes what a peer reports, in place of what it reported before on the same round.

        Returns the peers that reported another one; none if the peer has only said the same again.
        """
        peer = self.peer(index)
        if peer.fingerprint_round is None or round_ >= peer.fingerprint_round:
            peer.fingerprint, peer.fingerprint_round = value, round_
        reports = self._fingerprints.setdefault(round_, {})
        is_news = reports.get(index) != value
        reports[index] = value
        for old in sorted(self._fingerprints)[:-KEPT_FINGERPRINTS]:
            del self._fingerprints[old]
        others = {p for p, reported in reports.items() if reported != value} if is_news else set[int]()
        self.mismatches += bool(others)
        return others

    @property
    def round_s(self) -> float | None:
        """Median duration of the recent rounds."""
        return median(self.durations_s) if self.durations_s else None

    @property
    def payload_bytes_per_offer(self) -> float | None:
        """Mean over all offers that counted; None before the first one."""
        return self.payload_bytes / self.n_offers if self.n_offers else None

    @property
    def sent_bytes_per_peer_round(self) -> float | None:
        """All that peers have sent, payloads, framing, snapshots and control, by the offers that they made;
        None before the first one, and while no peer has said what it sent."""
        sent = sum(peer.sent_bytes for peer in self.peers.values())
        offers = sum(peer.offers_counted + peer.offers_missed for peer in self.peers.values())
        return sent / offers if sent and offers else None

    @property
    def ddp_bytes_per_peer_round(self) -> float | None:
        """What data-parallel training would send; None before the first commit."""
        return ddp_bytes(self.n_offers / self.n_commits, self.n_params) if self.n_commits else None

    def agreement(self, index: int) -> tuple[int, int] | None:
        """How many others reported the peer's newest fingerprint on that round, and how many another one.

        None: it has reported none, or long ago.
        """
        peer = self.peer(index)
        reports = {} if peer.fingerprint_round is None else self._fingerprints.get(peer.fingerprint_round, {})
        if index not in reports:
            return None
        n_same = sum(value == reports[index] for value in reports.values())
        return n_same - 1, len(reports) - n_same


def _count(x: Any) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or not 0 <= x < 2**63:
        raise ValueError(f"{x!r} is no count")
    return x
