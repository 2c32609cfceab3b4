"""The coordinator of one run: sessions and messages in, messages and commits out. It talks to no socket.

Glue between membership, rounds, ledger, blobs and what people want to know. Synchronous and not
thread-safe: callers serialise with an event loop or a lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..compression.errors import ConfigError, LedgerCorrupt
from .admission import AdmissionControl
from .announcer import Announcer
from .blobs import BlobStore
from .ledger import Ledger
from .membership import (
    Became,
    Membership,
    MembershipEvent,
    PeerState,
    SessionClosed,
    SessionOpened,
    SignOfLife,
    StateSaid,
    TimePassed,
)
from .observe.counters import Counters
from .observe.notices import awaited
from .observe.overview import overview
from .observe.page_history import HappeningKind, PageHistory
from .observe.run_statistics import RunStatistics
from .protocol.figures import finite
from .protocol.messages import (
    BadMessage,
    Commit,
    CommitBody,
    Heartbeat,
    Hello,
    Message,
    NodeState,
    Notice,
    Offer,
    OfferEntry,
    Rejected,
    Report,
    State,
    Welcome,
)
from .protocol.schedule import lr_factor_bits
from .protocol.settings import parse_settings
from .recall import recall
from .reports import Reports
from .retention import PayloadRetention
from .rounds import (
    BytesArrived,
    Excused,
    OfferKept,
    OfferMade,
    OfferRefused,
    PeerStops,
    PeerTrains,
    RoundClosed,
    RoundEvent,
    RoundOpened,
    Rounds,
)

log = logging.getLogger("thinwire.coordinator")

FAREWELL_S = 60.0
"""After the last round the coordinator serves for at most this long."""

FIRST_NOTICE_S = 1.0
NOTICE_EVERY_S = 5.0
SCRAPED_S = 3600.0
"""A peer that went without a word is listed for this long to be scraped, so that it is seen to be down."""

TOLD_AFTER_MISSES = 16
"""So many rounds in a row without an offer of its, and again after as many more: the peer is told."""


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
        history: bytes | None = None,
        banned: frozenset[str] = frozenset(),
    ) -> None:
        """`history`: what the method gave before a restart; `banned`: peers that are not let in.

        Raises ConfigError for another run's key or a config that it cannot read.
        """
        self._ledger, self._blobs, self._key = ledger, blobs, key
        self._send_to, self._on_commit, self._wall_ms = send, on_commit, wall_ms
        self._settings = parse_settings(ledger.genesis.config)
        try:
            key.public_key().verify(ledger.genesis_signature, ledger.genesis_record)
        except InvalidSignature:
            raise ConfigError("this key is not the one that the run was started with") from None
        self._admission = AdmissionControl(ledger, token, banned)
        self._n_adopted = 0
        """Commits that only the ledger knows so far: until `go_on` nothing that sessions say is heard."""
        self._counters = Counters()
        self._start(now_s, history)

    def _start(self, now_s: float, history: bytes | None) -> None:
        """Everything that is derived from the ledger, and nothing that sessions have brought."""
        ledger, run = self._ledger, self._settings.run
        n_params = sum(prod(entry.shape) for entry in ledger.genesis.layout)
        self._statistics, self._page_history = (
            RunStatistics(n_params),
            PageHistory(n_params, self._admission.rejected),
        )
        self._retention = PayloadRetention(self._blobs, run.snapshot_every, self._short)
        self._reports = Reports(
            *(
                ledger,
                self._statistics,
                self._page_history.trend,
                self._retention.snapshots,
                self._admission.rejected,
                run,
            )
        )
        self._announcer = Announcer(self._send_to, ledger.peer_id)
        self._offers: dict[int, Offer] = {}
        self._next_notice_s = now_s + FIRST_NOTICE_S
        self._admission.new_round()
        past = recall(
            ledger, self._blobs, self._statistics, self._retention, self._reports, self._page_history
        )
        if history is not None:
            self._page_history.restore(history, ledger.run_id.hex())
        self._members = Membership(self._settings.silence_s, past.training, now_s)
        self._rounds = Rounds(
            n_rounds=run.rounds,
            min_peers=run.min_peers,
            eval_every=run.eval_every,
            policy=self._settings.policy.name,
            max_offers=ledger.genesis.limits.max_peers,
            head=ledger.head_round,
            training=past.training,
            evaluator=past.evaluator,
            resting=past.resting,
            now_s=now_s,
        )
        self._over_s: float | None = now_s if self._rounds.is_over else None
        self.finished = False
        """The last round is committed and every training peer has said that it has it, or time is up."""

    # ---------------------------------------------------------------------------------------- sessions

    def open(self, peer_id: str, session: int, hello: Hello, now_s: float) -> Welcome:
        """Admits the peer; its older session is over. `session` grows with every session of the peer's.

        Raises ConfigError (token, banned), Incompatible (version, run, full swarm), LedgerCorrupt (a head
        that is not on the chain) or BadMessage (a session older than the open one).
        """
        self._admission.check_hello(hello)
        self._admission.check_peer(peer_id)
        self._admission.check_head(hello)
        known = self._ledger.index_of(peer_id)
        present = self._present()
        if known not in present:
            self._admission.check_room(len(present))
        if known is not None and not self._members.is_newer(known, session):
            raise self._admission.refused("old_session", BadMessage(f"session {session} has been replaced"))
        index = self._ledger.admit(peer_id)
        if known is None:
            log.info("admitted %s as peer %d (%s)", peer_id, index, hello.agent)
        self._counters.joined["new" if known is None else "returned"] += 1
        self._announcer.opened(index, hello.addresses)
        self._page_history.opened(index, hello.device)
        self._retention.welcomed(index)
        self._next_notice_s = min(self._next_notice_s, now_s + FIRST_NOTICE_S)
        self._handle_member(SessionOpened(index, session), now_s)
        return Welcome(
            genesis=self._ledger.genesis_record,
            signature=self._ledger.genesis_signature,
            head_round=self._ledger.head_round,
            head_digest=self._ledger.head_digest,
            kept_from=self._retention.kept_from,
            peer_index=index,
            heartbeat_s=self._settings.network.heartbeat_s,
        )

    def receive(self, peer_id: str, session: int, message: Message, now_s: float) -> None:
        """Raises BadMessage for what a peer must not send; frames of a replaced session are dropped."""
        if self._n_adopted:
            return
        index = self._ledger.index_of(peer_id)
        if index is None:
            raise self._admission.refused("not_admitted", BadMessage("no session is open"))
        if not self._members.is_current(index, session):
            self.count_rejected("old_session")
            return
        if not isinstance(message, State):
            self._handle_member(SignOfLife(index), now_s)
        match message:
            case State(state=state, needs_after=needs_after):
                self._said(index, state, needs_after, now_s)
            case Offer():
                self._offered(index, message, now_s)
            case Report():
                self._reported(index, message)
            case Heartbeat():
                self._statistics.heartbeat(index, message)
                self._page_history.beat(index, message)
            case _:
                text = f"{type(message).__name__} is not for the coordinator"
                raise self._admission.refused("wrong_message", BadMessage(text))

    def closed(self, peer_id: str, session: int, now_s: float) -> None:
        """The session's connection is over, for whatever reason."""
        index = self._ledger.index_of(peer_id)
        if index is not None and not self._n_adopted and self._members.is_current(index, session):
            self._handle_member(SessionClosed(index, session), now_s)

    def is_member(self, peer_id: str) -> bool:
        """Whether the peer is admitted and connected: others may serve it blobs."""
        index = self._ledger.index_of(peer_id)
        return index is not None and index in self._members.connected()

    def is_admitted(self, peer_id: str) -> bool:
        """Whether the peer has ever been let in."""
        return self._ledger.index_of(peer_id) is not None

    def scraped(self, now_s: float) -> list[str]:
        """Peers whose metrics are to be asked for: all that are connected, and those that went without a word
        not long ago."""
        listed = {*self._members.connected(), *self._members.missed(now_s, SCRAPED_S)}
        return [self._ledger.peer_id(index) for index in sorted(listed)]

    # ------------------------------------------------------------------------------------- lost commits

    def lacks(self, hello: Hello) -> bool:
        """Whether the node says that it has commits which this coordinator has lost: then they are to be
        adopted before it is let in. Raises ConfigError or Incompatible."""
        self._admission.check_hello(hello)
        return hello.head_round is not None and hello.head_round > self._ledger.head_round

    def hold(self) -> None:
        """From now on no round closes, until `go_on`: a commit made now might have been made before."""
        self._rounds.is_held = True

    def adopt(self, commits: Sequence[Commit]) -> None:
        """Takes back commits that follow the head; between `hold` and `go_on`. All of them, or none.

        All sessions are over from then on: the caller ends them, so that their nodes come back. Raises
        BadMessage (not this coordinator's, not the next ones) or LedgerCorrupt (a fork).
        """
        try:
            self._ledger.adopt(commits)
        except LedgerCorrupt as e:
            raise self._admission.refused("fork", e) from e
        except BadMessage as e:
            raise self._admission.refused("adopt", e) from e
        self._n_adopted += len(commits)

    def go_on(self, now_s: float) -> None:
        """Rounds close again. If there are adopted commits, it is as after a restart."""
        n_adopted, self._n_adopted = self._n_adopted, 0
        self._rounds.is_held = False
        if n_adopted:
            log.warning("got %d commits back from a node: round %d is the newest", n_adopted, self.head)
            self._start(now_s, self.history())

    # ------------------------------------------------------------------------------------------- blobs

    def may_store(self, peer_id: str, n_bytes: int) -> None:
        """Asked before a peer uploads a blob. Raises BadMessage: not a member, too large, too many."""
        index = self._ledger.index_of(peer_id)
        if index is None or not self.is_member(peer_id):
            raise self._admission.refused("not_admitted", BadMessage("only members may store blobs"))
        self._admission.check_upload(index, n_bytes)

    def blob_arrived(self, peer_id: str, digest: bytes, now_s: float) -> None:
        """The blob is in the store: offers that name it become eligible."""
        if self._n_adopted:
            return
        named = [index for index, offer in self._offers.items() if offer.digest == digest]
        for index in named:
            if self._blobs.size(digest) != self._offers[index].n_bytes:
                self.count_rejected("size")
                log.warning("peer %d offered a blob of another size than the one that came", index)
                self._handle_round(Excused(index, self._rounds.round), now_s)
            else:
                self._tell_payload(index)
        self._retention.offered(digest, self._rounds.round)
        self._handle_round(BytesArrived(digest), now_s)

    # ---------------------------------------------------------------------------------- time and people

    def tick(self, now_s: float) -> float:
        """Lets time pass; returns when it wants to be called again at the latest, in monotonic seconds."""
        if self._n_adopted:
            return now_s + 1.0
        self._handle_member(TimePassed(), now_s)
        self._handle_round(TimePassed(), now_s)
        self._announcer.tell(self._members.connected(), self._fetchable())
        self._notice(now_s)
        self._page_history.rejected(self._wall_ms(), self._admission.rejected)
        self._update_finished(now_s)
        wakes = [self._members.wake_s(), self._rounds.wake_s(), self._next_notice_s]
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
        if index is not None and not self._n_adopted:
            self._handle_round(Excused(index, round_), now_s)

    def count_rejected(self, reason: Rejected) -> None:
        """Counts something that was not let in; reasons are few and fixed, they become metric labels."""
        self._admission.rejected[reason] += 1

    def status(self, now_s: float) -> dict[str, Any]:
        """JSON-able, for `thinwire status` and the live table. Losses in nats, times in seconds."""
        rounds = self._rounds
        waits = not rounds.is_over and rounds.opened_s is None
        return {
            "run": self._settings.run.name,
            "run_id": self._ledger.run_id.hex(),
            "round": rounds.head,
            "rounds": self._settings.run.rounds,
            "state": "finished" if rounds.is_over else "waiting" if waits else "training",
            "held_out": [list(entry) for entry in self._ledger.held_out()],
            "peers": [self._peer_status(*peer, now_s) for peer in self._ledger.peers().items()],
            "rejected": dict(sorted(self._admission.rejected.items())),
            "since_start": self._counters.figures(),
            "ledger_bytes": self._ledger.n_bytes,
            **self._retention.figures(self._members.connected()),
            **self._statistics.figures(),
        }

    def overview(self, now_s: float) -> dict[str, Any]:
        """JSON-able and bounded, for the page."""
        rounds, members = self._rounds, self._members
        return overview(
            *(self._settings.run, self._ledger, rounds, members, self._statistics, self._page_history),
            now_s=now_s,
            now_ms=self._wall_ms(),
        )

    def trend(self, since: int) -> dict[str, Any]:
        """JSON-able and bounded: the points of the charts that have changed since that stamp."""
        trend = self._page_history.trend
        return {"stamp": trend.stamp, **trend.points(since)}

    def history(self) -> bytes:
        """What only this process has seen of the run, to be kept over a restart; small."""
        return self._page_history.saved(self._ledger.run_id.hex())

    def _peer_status(self, index: int, peer_id: str, now_s: float) -> dict[str, Any]:
        seen_s = self._members.seen_s(index)
        return {
            "peer_id": peer_id,
            "index": index,
            "state": str(self._members.state(index)),
            "last_seen_s": None if seen_s is None else max(0.0, now_s - seen_s),
            **self._statistics.peer(index).figures(),
        }

    # --------------------------------------------------------------------------------- offers and rounds

    def _offered(self, index: int, offer: Offer, now_s: float) -> None:
        digest = self._admission.check_offer(offer)
        stored = None if offer.digest is None else self._blobs.size(digest)
        if stored is not None and stored != offer.n_bytes:
            text = f"a blob of {stored} bytes offered as {offer.n_bytes}"
            raise self._admission.refused("size", BadMessage(text))
        if stored is not None:
            self._retention.offered(digest, self._rounds.round)
        here = offer.payload is not None or stored is not None
        self._handle_round(OfferMade(index, offer.round, digest, here, offer.n_samples), now_s, offer)

    def _handle_round(self, event: RoundEvent, now_s: float, offer: Offer | None = None) -> None:
        for action in self._rounds.handle(event, now_s):
            match action:
                case RoundClosed():
                    self._commit(action, now_s)
                case OfferRefused(peer, reason):
                    self._refused(peer, reason)
                case RoundOpened(round_, expected):
                    self._next_notice_s = now_s + NOTICE_EVERY_S
                    log.debug("round %d is open for %d peers", round_, len(expected))
                case OfferKept(peer, is_new):
                    if is_new and offer is not None:
                        self._offers[peer] = offer
                        self._tell_payload(peer)

    def _tell_payload(self, peer: int) -> None:
        offer = self._fetchable().get(peer)
        if offer is not None:
            self._announcer.tell_offered(peer, offer, self._members.connected())

    def _fetchable(self) -> dict[int, Offer]:
        """Offers whose payload others may fetch ahead. Not before it is here: the line of the peer that made
        it is for the upload first, which the round waits for."""
        return {
            peer: offer
            for peer, offer in self._offers.items()
            if offer.digest is not None and self._blobs.size(offer.digest) == offer.n_bytes
        }

    def _refused(self, peer: int, reason: Rejected) -> None:
        self.count_rejected(reason)
        log.info("an offer of peer %d is not taken: %s", peer, reason)
        if reason == "changed_offer":
            text = "your first offer of this round stands: a different one was refused"
            self._announcer.send(Notice(text=text, warning=True), [peer])

    def _commit(self, closed: RoundClosed, now_s: float) -> None:
        run = self._settings.run
        reports, snapshots = self._reports.take()
        body = CommitBody(
            round=closed.round,
            parent=self._ledger.head_digest,
            offers=tuple(_entry(index, self._offers[index]) for index in closed.peers),
            admitted=self._ledger.pending_admissions(),
            lr_factor_bits=lr_factor_bits(self._settings.schedule, closed.round + 1, run.rounds),
            reports=reports,
            snapshots=snapshots,
            evaluator=closed.evaluator,
            time_ms=self._wall_ms(),
        )
        commit = self._ledger.append(body, self._key)
        self._statistics.committed(body)
        self._page_history.committed(commit)
        self._page_history.closed(closed.why, closed.duration_s)
        self._statistics.round_closed(closed.duration_s, closed.missing)
        self._counters.round_closed(closed.why, closed.duration_s)
        self._tell_the_slow(closed.missing)
        self._reports.committed(body)
        self._retention.committed(body, self._present())
        self._offers.clear()
        self._admission.new_round()
        self._over_s = now_s if self._rounds.is_over else None
        log.info("round %d: %d offers, %.2f s", closed.round, len(closed.peers), closed.duration_s)
        self._on_commit(closed.round)

    def _tell_the_slow(self, missing: Sequence[int]) -> None:
        """A peer whose work never counts should know."""
        for index in missing:
            n = self._statistics.peer(index).missed_in_a_row
            if n % TOLD_AFTER_MISSES == 0:
                text = (
                    f"the last {n} rounds closed without an offer of yours: this machine or its link is much "
                    f"slower than the others. With [work] round_s in the run's configuration every node does "
                    f"as much as it can in that time."
                )
                self._announcer.send(Notice(text=text, warning=True), [index])

    def _reported(self, index: int, report: Report) -> None:
        if report.round > self._ledger.head_round:
            raise self._admission.refused(
                "report_round", BadMessage(f"a report on round {report.round} to come")
            )
        differ = self._reports.note(index, report)
        if differ:
            names = ", ".join(self._short(peer) for peer in sorted(differ))
            text = f"round {report.round}: the replica of {self._short(index)} differs from that of {names}"
            log.error("%s", text)
            self._broadcast(Notice(text=text, warning=True))
            told = ", ".join(self._called(peer) for peer in sorted(differ)[:4])
            told = f"round {report.round}: {self._called(index)} differs from {told}"
            self._page_history.happened(self._wall_ms(), "differs", told)

    # ------------------------------------------------------------------------------- members and sending

    def _handle_member(self, event: MembershipEvent, now_s: float) -> None:
        for became in self._members.handle(event, now_s):
            peer = became.peer
            log.info("%s is %s: %s", self._short(peer), became.state, became.reason)
            if became.cause is not None:
                self._counters.left[became.cause] += 1
            if (kind := _kind(became)) is not None:
                self._page_history.happened(self._wall_ms(), kind, self._called(peer))
            if became.state is PeerState.TRAINING:
                self._handle_round(PeerTrains(peer), now_s)
            else:
                self._handle_round(PeerStops(peer), now_s)

    def _said(self, index: int, state: NodeState, needs_after: int | None, now_s: float) -> None:
        if state is not NodeState.JOINING:
            self._retention.needs_nothing(index)
        elif needs_after is not None:
            self._retention.needs(index, needs_after)
        self._handle_member(StateSaid(index, state), now_s)

    def _present(self) -> set[int]:
        """Peers that are there, or have been a moment ago."""
        return {*self._members.alive(), *self._members.connected()}

    def _broadcast(self, message: Message) -> None:
        self._announcer.send(message, self._members.connected())

    def _notice(self, now_s: float) -> None:
        """Says what is awaited, every few seconds while it lasts longer than usual."""
        if now_s < self._next_notice_s:
            return
        self._next_notice_s = now_s + NOTICE_EVERY_S
        min_peers, usual_s = self._settings.run.min_peers, self._statistics.round_s
        text = awaited(self._rounds, min_peers, usual_s or 0.0, self._short, now_s)
        if text is not None:
            log.info("%s", text)
            self._broadcast(Notice(text=text, warning=False))

    def _update_finished(self, now_s: float) -> None:
        if self._over_s is None or self.finished:
            return
        awaited = set(self._members.training()) - self._reports.acknowledged
        self.finished = not awaited or now_s >= self._over_s + FAREWELL_S

    def _called(self, index: int) -> str:
        """As the page calls it."""
        return f"peer {index} …{self._ledger.peer_id(index)[-6:]}"

    def _short(self, index: int) -> str:
        peer_id = self._ledger.peer_id(index)
        return peer_id if len(peer_id) <= 20 else f"{peer_id[:8]}..{peer_id[-6:]}"


def _kind(became: Became) -> HappeningKind | None:
    """What people are told of it, if anything."""
    if became.state is PeerState.TRAINING:
        return "joined"
    if became.cause is None:
        return None
    return "left" if became.cause == "said_so" else "lost"


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
