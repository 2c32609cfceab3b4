"""The coordinator of one run: sessions and messages in, messages and commits out. It talks to no socket.

Glue between membership, rounds, ledger, blobs and what people want to know. Synchronous and not
thread-safe: callers serialise with an event loop or a lock.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import ConfigError, Incompatible, LedgerCorrupt
from thinwire.coordinator import membership as m
from thinwire.coordinator import rounds as r
from thinwire.coordinator.blobs import PROTECTED_ROUNDS, BlobStore
from thinwire.coordinator.board import Board, finite
from thinwire.coordinator.donors import Donors, Sends
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.messages import (
    INLINE_BYTES,
    PROTOCOL_VERSION,
    BadMessage,
    BlobRef,
    Commit,
    CommitBody,
    Heartbeat,
    Hello,
    Member,
    Members,
    Message,
    Notice,
    Offer,
    OfferEntry,
    Report,
    ReportEntry,
    State,
    WantSnapshot,
    Welcome,
    digest_of,
)
from thinwire.coordinator.schedule import lr_factor_bits
from thinwire.coordinator.settings import parse_settings

E = TypeVar("E", bound=Exception)

log = logging.getLogger("thinwire.coordinator")

RECALLED_COMMITS = 3
"""After a restart the peers of this many last commits stay expected for a while."""

FAREWELL_S = 60.0
"""After the last round the coordinator serves for at most this long."""

NOTICE_EVERY_S = 5.0
PENDING_UPLOADS = 4
"""Times `max_payload_bytes` that a peer may upload between two commits."""

REPORTS_PER_COMMIT = 4
"""Fingerprints of one peer that a commit takes up."""


class Service:
    """One run. `send` queues a message for a peer's current session and never blocks, fails or calls back;
    `on_commit` is told a round once its commit is on the disk.

    `open` sends nothing to the peer that it opens for. Call `tick` after each call, and again when it says.
    Heartbeats are not answered here: who owns the streams sends its own, with its own counts.
    `now_s` is monotonic; `wall_ms` is only written into records.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        blobs: BlobStore,
        key: Ed25519PrivateKey,
        token: str,
        send: Callable[[str, Message], None],
        on_commit: Callable[[int], None],
        now_s: float,
        wall_ms: Callable[[], int],
    ) -> None:
        """Raises ConfigError for another run's key or a config that it cannot read."""
        self._ledger, self._blobs, self._key, self._token = ledger, blobs, key, token
        self._send_to, self._on_commit, self._wall_ms = send, on_commit, wall_ms
        self._settings = parse_settings(ledger.genesis.config)
        self._limits = ledger.genesis.limits
        try:
            key.public_key().verify(ledger.genesis_signature, ledger.genesis_record)
        except InvalidSignature:
            raise ConfigError("this key is not the one that the run was started with") from None
        self._board = Board(n_params=sum(prod(entry.shape) for entry in ledger.genesis.layout))
        self._addresses: dict[int, tuple[str, ...]] = {}
        self._told_members: Members | None = None
        self._offers: dict[int, Offer] = {}
        self._uploaded_bytes: dict[int, int] = {}
        self._reports: list[ReportEntry] = []
        self._acknowledged: set[int] = set()
        # By convention the first peer evaluates the model before round 1.
        self._evaluators: dict[int, int | None] = {0: 0}
        self._untold: set[int] = set()
        self._next_notice_s = now_s + NOTICE_EVERY_S
        recalled, evaluator, resting = self._recall()
        self._members = m.Membership(self._settings.silence_s, recalled, now_s)
        self._rounds = r.Rounds(
            n_rounds=self._settings.run.rounds,
            min_peers=self._settings.run.min_peers,
            eval_every=self._settings.run.eval_every,
            policy=self._settings.policy.name,
            max_offers=self._limits.max_peers,
            head=ledger.head_round,
            training=recalled,
            evaluator=evaluator,
            resting=resting,
            now_s=now_s,
        )
        self._donors = Donors(self._members.training, ledger.peer_id)
        self._over_s: float | None = now_s if self._rounds.is_over else None
        self.finished = False
        """The last round is committed and every training peer has said that it has it, or time is up."""

    # ---------------------------------------------------------------------------------------- sessions

    def open(self, peer_id: str, session: int, hello: Hello, now_s: float) -> Welcome:
        """Admits the peer; its older session is over. `session` grows with every session of the peer's.

        Raises ConfigError (token), Incompatible (version, run, full swarm), LedgerCorrupt (a head that is
        not on the chain) or BadMessage (a session older than the open one).
        """
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            raise self._counted("token", ConfigError("the ticket's token is wrong: ask for a new ticket"))
        self._check_protocol(hello)
        self._check_head(hello)
        known = self._ledger.index_of(peer_id)
        alive = self._members.alive()
        if known not in alive and len(alive) >= self._limits.max_peers:
            text = f"the swarm is full: {len(alive)} of {self._limits.max_peers} peers"
            raise self._counted("full", Incompatible(text))
        if known is not None and not self._members.is_newer(known, session):
            raise self._counted("old_session", BadMessage(f"session {session} has been replaced"))
        index = self._ledger.admit(peer_id)
        if known is None:
            log.info("admitted %s as peer %d (%s)", peer_id, index, hello.agent)
        self._addresses[index] = hello.addresses
        self._uploaded_bytes.pop(index, None)
        self._donors.forget(index)
        self._untold.add(index)
        self._handle_member(m.SessionOpened(index, session), now_s)
        return Welcome(
            genesis=self._ledger.genesis_record,
            signature=self._ledger.genesis_signature,
            head_round=self._ledger.head_round,
            head_digest=self._ledger.head_digest,
            peer_index=index,
            heartbeat_s=self._settings.network.heartbeat_s,
        )

    def receive(self, peer_id: str, session: int, message: Message, now_s: float) -> None:
        """Raises BadMessage for what a peer must not send; frames of a replaced session are dropped."""
        index = self._ledger.index_of(peer_id)
        if index is None:
            raise self._counted("not_admitted", BadMessage("no session is open"))
        if not self._members.is_current(index, session):
            self.count_rejected("old_session")
            return
        if not isinstance(message, State):
            self._handle_member(m.SignOfLife(index), now_s)
        match message:
            case State(state=state):
                self._handle_member(m.StateSaid(index, state), now_s)
            case Offer():
                self._offered(index, message, now_s)
            case Report():
                self._reported(index, message)
            case Heartbeat():
                self._board.heartbeat(index, message)
            case WantSnapshot():
                self._send(self._donors.want(index, now_s))
            case _:
                text = f"{type(message).__name__} is not for the coordinator"
                raise self._counted("wrong_message", BadMessage(text))

    def closed(self, peer_id: str, session: int, now_s: float) -> None:
        """The session's connection is over, for whatever reason."""
        index = self._ledger.index_of(peer_id)
        if index is not None and self._members.is_current(index, session):
            self._donors.forget(index)
            self._handle_member(m.SessionClosed(index, session), now_s)

    def is_member(self, peer_id: str) -> bool:
        """Whether the peer is admitted and connected: others may serve it blobs."""
        index = self._ledger.index_of(peer_id)
        return index is not None and index in self._members.connected()

    # ------------------------------------------------------------------------------------------- blobs

    def may_store(self, peer_id: str, n_bytes: int) -> None:
        """Asked before a peer uploads a blob. Raises BadMessage: not a member, too large, too many."""
        index = self._ledger.index_of(peer_id)
        if index is None or not self.is_member(peer_id):
            raise self._counted("not_admitted", BadMessage("only members may store blobs"))
        most = self._limits.max_payload_bytes
        if n_bytes > most:
            text = f"a payload of {n_bytes} bytes, this run allows {most}"
            raise self._counted("oversized", BadMessage(text))
        uploaded = self._uploaded_bytes.get(index, 0) + n_bytes
        if uploaded > PENDING_UPLOADS * most:
            raise self._counted("quota", BadMessage(f"{uploaded} bytes uploaded since the last commit"))
        self._uploaded_bytes[index] = uploaded

    def blob_arrived(self, peer_id: str, digest: bytes, now_s: float) -> None:
        """The blob is in the store: offers that name it become eligible."""
        named = [index for index, offer in self._offers.items() if offer.digest == digest]
        for index in named:
            if self._blobs.size(digest) != self._offers[index].n_bytes:
                log.warning("peer %d offers a blob of another size than %s stored", index, peer_id)
                self.count_rejected("size")
                return
        self._blobs.mark(digest, self._rounds.round)
        self._handle_round(r.BytesArrived(digest), now_s)

    # ---------------------------------------------------------------------------------- time and people

    def tick(self, now_s: float) -> float:
        """Lets time pass; returns when it wants to be called again at the latest, in monotonic seconds."""
        self._handle_member(m.TimePassed(), now_s)
        self._handle_round(r.TimePassed(), now_s)
        self._send(self._donors.tick(now_s))
        self._tell_members()
        self._notice(now_s)
        self._update_finished(now_s)
        wakes = [self._members.wake_s(), self._rounds.wake_s(), self._donors.wake_s(), self._next_notice_s]
        if self._over_s is not None and not self.finished:
            wakes.append(self._over_s + FAREWELL_S)
        return min(wake for wake in wakes if wake is not None)

    def commits(self, after: int, limit: int) -> list[Commit]:
        """At most `limit` commits from round `after` + 1 on, as they are stored."""
        return self._ledger.commits(after, limit)

    @property
    def head(self) -> int:
        """The newest committed round."""
        return self._ledger.head_round

    def excuse(self, peer_id: str, round_: int, now_s: float) -> None:
        """The peer will make no offer in this round: nobody waits for it."""
        index = self._ledger.index_of(peer_id)
        if index is not None:
            self._handle_round(r.Excused(index, round_), now_s)

    def count_rejected(self, reason: str) -> None:
        """Counts something that was not let in; reasons are few and fixed, they become metric labels."""
        self._board.rejected[reason] += 1

    def status(self, now_s: float) -> dict[str, Any]:
        """JSON-able, for `thinwire status` and the live table. Losses in nats, times in seconds."""
        board, run = self._board, self._settings.run
        waits = not self._rounds.is_over and self._rounds.opened_s is None
        return {
            "run": run.name,
            "run_id": self._ledger.run_id.hex(),
            "round": self._rounds.head,
            "rounds": run.rounds,
            "state": "finished" if self._rounds.is_over else "waiting" if waits else "training",
            "held_out": [list(entry) for entry in self._ledger.held_out()],
            "loss": board.loss,
            "round_s": board.round_s,
            "peers": [self._peer_status(index, now_s) for index in sorted(self._ledger.peers())],
            "payload_bytes_per_peer_round": board.payload_bytes_per_offer,
            "mismatches": board.mismatches,
            "rejected": dict(sorted(board.rejected.items())),
            "n_params": board.n_params,
            "ddp_bytes_per_peer_round": board.ddp_bytes_per_peer_round,
        }

    def _peer_status(self, index: int, now_s: float) -> dict[str, Any]:
        peer = self._board.peer(index)
        seen_s = self._members.seen_s(index)
        return {
            "peer_id": self._ledger.peer_id(index),
            "index": index,
            "state": str(self._members.state(index)),
            "last_seen_s": None if seen_s is None else max(0.0, now_s - seen_s),
            "offers_counted": peer.offers_counted,
            "offers_missed": peer.offers_missed,
            "fingerprint": None if peer.fingerprint is None else peer.fingerprint.hex(),
            "fingerprint_round": peer.fingerprint_round,
            "loss": peer.loss,
            "sent_bytes": peer.sent_bytes,
            "received_bytes": peer.received_bytes,
            "payload_bytes": peer.payload_bytes,
            "round": peer.round,
        }

    # ------------------------------------------------------------------------------------------ checks

    def _counted(self, reason: str, error: E) -> E:
        self.count_rejected(reason)
        return error

    def _check_protocol(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            text = f"protocol version {hello.version} here, {PROTOCOL_VERSION} at the coordinator"
            raise self._counted("version", Incompatible(f"{text}: install the same thinwire"))
        if hello.run_id != self._ledger.run_id:
            text = (
                f"the ticket is for run {hello.run_id.hex()[:16]}, this is {self._ledger.run_id.hex()[:16]}"
            )
            raise self._counted("run", Incompatible(text))

    def _check_head(self, hello: Hello) -> None:
        """A node that has applied a commit which is not on this chain must not go on, nor must the run."""
        if hello.head_round is None:
            return
        ours = self._ledger.digest_at(hello.head_round)
        if ours is not None and ours == hello.head_digest:
            return
        text = f"the node is at a round {hello.head_round} which is not on this ledger"
        if ours is None:
            text += f": it ends with round {self._ledger.head_round}. Was it restored from an older copy?"
        raise self._counted("head", LedgerCorrupt(text))

    def _check_offer(self, offer: Offer) -> bytes:
        """Returns the payload's digest. Raises BadMessage for an offer that no node of ours makes."""
        most = self._limits
        if (offer.payload is None) == (offer.digest is None):
            raise self._counted("offer", BadMessage("an offer has either a payload or a digest"))
        if offer.n_bytes > most.max_payload_bytes:
            raise self._counted("oversized", BadMessage(f"a payload of {offer.n_bytes} bytes"))
        if offer.n_samples > most.max_samples:
            raise self._counted("samples", BadMessage(f"{offer.n_samples} samples in an offer"))
        if offer.payload is None:
            if offer.digest is None:
                raise AssertionError("checked above")
            return offer.digest
        if len(offer.payload) > INLINE_BYTES or len(offer.payload) != offer.n_bytes:
            raise self._counted("size", BadMessage(f"{len(offer.payload)} bytes inside of an offer"))
        return digest_of(offer.payload)

    # --------------------------------------------------------------------------------- offers and rounds

    def _offered(self, index: int, offer: Offer, now_s: float) -> None:
        digest = self._check_offer(offer)
        stored = None if offer.payload is not None else self._blobs.size(digest)
        if stored is not None and stored != offer.n_bytes:
            raise self._counted("size", BadMessage(f"a blob of {stored} bytes offered as {offer.n_bytes}"))
        here = offer.payload is not None or stored is not None
        if here and offer.payload is None:
            self._blobs.mark(digest, self._rounds.round)
        if offer.round == self._rounds.round:
            self._offers.setdefault(index, offer)
        self._handle_round(r.Offered(index, offer.round, digest, here), now_s)

    def _handle_round(self, event: r.Event, now_s: float) -> None:
        for action in self._rounds.handle(event, now_s):
            match action:
                case r.RoundClosed():
                    self._commit(action, now_s)
                case r.OfferRefused(peer, reason):
                    self._refused(peer, reason)
                case r.RoundOpened(round_, expected):
                    self._next_notice_s = now_s + NOTICE_EVERY_S
                    log.debug("round %d is open for %d peers", round_, len(expected))
                case r.OfferKept():
                    pass

    def _refused(self, peer: int, reason: str) -> None:
        self.count_rejected(reason)
        log.info("an offer of peer %d is not taken: %s", peer, reason)
        if reason == "changed_offer":
            text = "your first offer of this round stands: a different one was refused"
            self._send([(peer, Notice(text=text, warning=True))])

    def _commit(self, closed: r.RoundClosed, now_s: float) -> None:
        run = self._settings.run
        reports, self._reports = self._reports, []
        body = CommitBody(
            round=closed.round,
            parent=self._ledger.head_digest,
            offers=tuple(_entry(index, self._offers[index]) for index in closed.peers),
            admitted=self._ledger.pending_admissions(),
            lr_factor_bits=lr_factor_bits(self._settings.schedule, closed.round + 1, run.rounds),
            reports=tuple(reports),
            evaluator=closed.evaluator,
            time_ms=self._wall_ms(),
        )
        self._ledger.append(body, self._key)
        self._board.committed(body)
        self._board.durations_s.append(closed.duration_s)
        for index in closed.missing:
            self._board.peer(index).offers_missed += 1
        self._evaluators[closed.round] = closed.evaluator
        self._offers.clear()
        self._uploaded_bytes.clear()
        self._over_s = now_s if self._rounds.is_over else None
        log.info("round %d: %d offers, %.2f s", closed.round, len(closed.peers), closed.duration_s)
        self._on_commit(closed.round)

    # ------------------------------------------------------------------------------------------ reports

    def _reported(self, index: int, report: Report) -> None:
        if report.round > self._ledger.head_round:
            raise self._counted("report_round", BadMessage(f"a report on round {report.round} to come"))
        if report.fingerprint is not None:
            self._note_fingerprint(index, report.round, report.fingerprint)
        if report.held_out is not None:
            self._note_held_out(index, report.round, report.held_out)
        if report.snapshot is not None and report.snapshot_bytes is not None:
            self._send(self._donors.published(index, report.round, report.snapshot, report.snapshot_bytes))
        evaluates = self._evaluators.get(report.round) == index
        if report.round == self._settings.run.rounds and (report.held_out is not None or not evaluates):
            self._acknowledged.add(index)

    def _note_fingerprint(self, index: int, round_: int, value: bytes) -> None:
        if self._board.has_reported(index, round_, value):
            return
        others = self._board.fingerprint(index, round_, value)
        if sum(entry.peer == index for entry in self._reports) < REPORTS_PER_COMMIT:
            self._reports.append(ReportEntry(peer=index, round=round_, fingerprint=value))
        else:
            self.count_rejected("too_many_reports")
        if others:
            names = ", ".join(self._short(peer) for peer in sorted(others))
            text = f"round {round_}: the replica of {self._short(index)} differs from that of {names}"
            log.error("%s", text)
            self._broadcast(Notice(text=text, warning=True))

    def _note_held_out(self, index: int, round_: int, loss: float) -> None:
        if self._evaluators.get(round_) != index or finite(loss) is None:
            self.count_rejected("held_out")
            return
        self._ledger.note_held_out(round_, loss)
        log.info("round %d: held-out loss %.4f", round_, loss)

    # ------------------------------------------------------------------------------- members and sending

    def _handle_member(self, event: m.Event, now_s: float) -> None:
        for became in self._members.handle(event, now_s):
            peer = became.peer
            log.info("%s is %s: %s", self._short(peer), became.state, became.reason)
            if became.state is m.PeerState.TRAINING:
                self._handle_round(r.PeerTrains(peer), now_s)
            else:
                self._handle_round(r.PeerStops(peer), now_s)
                self._send(self._donors.gone(peer, now_s))

    def _send(self, sends: Sends) -> None:
        for index, message in sends:
            self._send_to(self._ledger.peer_id(index), message)

    def _broadcast(self, message: Message) -> None:
        self._send([(index, message) for index in self._members.connected()])

    def _tell_members(self) -> None:
        """To everybody when it changes, and to whoever has opened a session since."""
        connected = self._members.connected()
        members = Members(
            members=tuple(
                Member(peer_id=self._ledger.peer_id(index), addresses=self._addresses[index])
                for index in connected
            )
        )
        if members != self._told_members:
            self._told_members = members
            self._untold.clear()
            self._broadcast(members)
        for index in self._untold.intersection(connected):
            self._send([(index, members)])
        self._untold.clear()

    def _notice(self, now_s: float) -> None:
        """Says what is awaited, every few seconds while it lasts longer than usual."""
        if now_s < self._next_notice_s:
            return
        self._next_notice_s = now_s + NOTICE_EVERY_S
        text = self._awaited(now_s)
        if text is not None:
            log.info("%s", text)
            self._broadcast(Notice(text=text, warning=False))

    def _awaited(self, now_s: float) -> str | None:
        rounds, min_peers = self._rounds, self._settings.run.min_peers
        if rounds.is_over:
            return None
        if rounds.opened_s is None:
            n = len(rounds.training)
            return f"waiting for {min_peers - n} more peers: {n} of {min_peers} are training"
        since_s = now_s - rounds.opened_s
        if since_s < 2 * (self._board.round_s or 0.0):
            return None
        missing = rounds.missing()
        if not missing:
            return f"round {rounds.round}: waiting for an offer of anybody since {since_s:.0f} s"
        names = ", ".join(self._short(peer) for peer in missing[:8]) + (", ..." if len(missing) > 8 else "")
        n = max(len(rounds.expected), len(missing))
        return (
            f"round {rounds.round}: waiting for {len(missing)} of {n} peers ({names}) since {since_s:.0f} s"
        )

    def _update_finished(self, now_s: float) -> None:
        if self._over_s is None or self.finished:
            return
        awaited = set(self._members.training()) - self._acknowledged
        self.finished = not awaited or now_s >= self._over_s + FAREWELL_S

    def _short(self, index: int) -> str:
        peer_id = self._ledger.peer_id(index)
        return peer_id if len(peer_id) <= 20 else f"{peer_id[:8]}..{peer_id[-6:]}"

    # ------------------------------------------------------------------------------------------ restart

    def _recall(self) -> tuple[frozenset[int], int | None, int | None]:
        """From the ledger: figures, blobs in use; returns recalled peers, last evaluator and who rests."""
        genesis, head = self._ledger.genesis, self._ledger.head_round
        recalled: set[int] = set()
        for commit in self._ledger.all_commits():
            body = commit.body
            self._board.committed(body)
            for entry in body.reports:
                self._board.fingerprint(entry.peer, entry.round, entry.fingerprint)
            self._evaluators[body.round] = body.evaluator
            if body.round > head - RECALLED_COMMITS:
                recalled.update(offer.peer for offer in body.offers)
            if body.round > head - PROTECTED_ROUNDS:
                for offer in body.offers:
                    if offer.digest is not None:
                        self._blobs.mark(offer.digest, body.round)
        for ref in (genesis.base, genesis.held_out, genesis.corpus):
            if ref is not None:
                self._pin(ref)
        named = [e for e in self._evaluators.values() if e is not None]
        resting = self._evaluators.get(head) if head else None
        return frozenset(recalled), (named[-1] if head and named else None), resting

    def _pin(self, ref: BlobRef) -> None:
        if ref.digest not in self._blobs:
            raise ConfigError(f"blob {ref.digest.hex()} of the run is missing: put it into the blob store")
        self._blobs.pin(ref.digest)


def _entry(index: int, offer: Offer) -> OfferEntry:
    return OfferEntry(
        peer=index,
        n_samples=offer.n_samples,
        n_tokens=offer.n_tokens,
        loss=finite(offer.loss),
        n_bytes=offer.n_bytes,
        payload=offer.payload,
        digest=offer.digest,
    )
