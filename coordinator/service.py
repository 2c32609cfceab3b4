"""The coordinator of one run: sessions and messages in, messages and commits out. It talks to no socket.

What callers see of a run. The parts have modules of their own: who is there (`peers`), what is offered
and counts (`open_round`, `rounds`), what follows from the ledger (`derived_state`), and what people see
(`observe`). Synchronous and not thread-safe: callers serialise with an event loop or a lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..compression.errors import ConfigError, LedgerCorrupt, SwarmUnreachable, ThinwireError
from .admission import AdmissionControl
from .announcer import Announcer
from .blobs import BlobStore
from .control.orders import CheckStrategy, Order, Ordered, no_strategy
from .entry.rules import OPEN, EntryRules
from .last_snapshot import Wanted
from .ledger import Ledger
from .membership import Membership, TimePassed
from .observe.counters import Counters
from .observe.loss_unit import LossUnit
from .observe.notices import Notices
from .observe.refusals import Refusals
from .observe.run_view import RunView
from .open_round import OpenOffers, OpenRound
from .peers import Peers
from .protocol.figures import counted
from .protocol.identity import peer_id_of
from .protocol.messages import (
    AccessEntry,
    BadMessage,
    Commit,
    CommitteeEntry,
    Hello,
    Message,
    Offer,
    Rejected,
    Welcome,
)
from .protocol.settings import KEEP_SNAPSHOTS, Course, Keep
from .protocol.trust.signed_offers import is_signed
from .quorum.log import Alone, Log
from .quorum.memory import memory_of
from .quorum.recollection import Recollection
from .rounds import Excused, RoundClosed
from .serving.fanout import Fanout
from .serving.guarding import Guarding
from .serving.hearing import Hearing
from .serving.ordering import Ordering
from .serving.parts import FAREWELL_S, Parts, open_rounds
from .trust.sentences import Sentences

log = logging.getLogger("thinwire.coordinator")


class Service:
    """One run. `send` queues a message for a peer's current session and never blocks, fails or calls back;
    `on_commit` is told a round once its commit is on the disk; `end` tells a peer why its session is over.

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
        end: Callable[[str, ThinwireError], object] = lambda _peer_id, _why: None,
        now_s: float,
        wall_ms: Callable[[], int],
        history: bytes | None = None,
        banned: frozenset[str] = frozenset(),
        rules: EntryRules = OPEN,
        check_strategy: CheckStrategy = no_strategy,
        loss_unit: str | None = None,
        keep: Keep = KEEP_SNAPSHOTS,
        log: Log | None = None,
        recollection: Recollection | None = None,
        held: Callable[[bytes], bool] = lambda _digest: True,
        fanout: Fanout | None = None,
    ) -> None:
        """`log`: None: this coordinator orders the run alone. `recollection`: what is known of the ledger, up
        to its head; None: it is read, with `keep` and `history`. `held`: whether enough seats hold a payload
        that is in the store here, and the same ones all others of the open round that are held, so that they
        can vote for a record that names these; see `held_arrived`. `history`: what the method gave before a
        restart; `banned`, `rules`: who is not let in, and who is; `check_strategy`: of what the owner wants
        to change of its options; `loss_unit`: where the run's task is not built in; `keep`: of counted
        payloads; `fanout`: from whom nodes fetch them.

        Raises ConfigError for another run's key or a config that it cannot read.
        """
        self._ledger, self._blobs = ledger, blobs
        self._log = Alone(ledger, key) if log is None else log
        self._send_to, self._on_commit, self._wall_ms = send, on_commit, wall_ms
        self._settings = Course.of(ledger.genesis.config).settings
        self._keep, self._held = keep, held
        self._own, self._fanout = peer_id_of(key.public_key()), fanout or Fanout()
        if self._own not in (ledger.genesis.coordinator, *ledger.committee.seats):
            raise ConfigError("this key is not the one that the run was started with, nor a seat's")
        self._loss_unit = loss_unit or self._settings.task.loss_unit
        self._recollection = recollection or Recollection(ledger, blobs, keep, history)
        rejected = self._recollection.rejected
        access = self._recollection.derived.access
        self._admission = AdmissionControl(ledger, token, banned, rules, wall_ms, rejected, access)
        self._n_adopted = 0
        """Commits that only the ledger knows so far: until `go_on` nothing that sessions say is heard."""
        self._is_dropped = False
        self._counters = Counters()
        self._refusals = Refusals(self._admission.rejected)
        gate = self._admission.gate
        self._ordering = Ordering(
            ledger, self._log, gate, check_strategy, wall_ms, lambda: self._parts, self._committed
        )
        self._hearing = Hearing(ledger, self._admission, lambda: self._parts, end)
        self._guarding = Guarding(gate, self._ordering, lambda: self._parts, end, self._leaves)
        self._parts = self._recalled(now_s)

    def _recalled(self, now_s: float) -> Parts:
        """Everything that follows from the ledger, and nothing that sessions have brought."""
        ledger, derived, names = self._ledger, self._recollection.derived, self._recollection.names
        past = derived.open_round()
        members = Membership(self._settings.silence_s, past.training, now_s)
        announcer = Announcer(self._send_to, ledger.peer_id, self._own, self._fanout)
        notices = Notices(announcer, members, names, derived.page_history, self._wall_ms, now_s)
        sentences = Sentences(derived.standing, announcer, names)
        rounds = open_rounds(derived.course, ledger, past, self._recollection.take_memory(), now_s)
        rounds.is_held = self._log.is_over
        rounds.condemn(derived.standing.condemned_in(ledger.head_round + 1))
        open_round = OpenRound(
            rounds,
            OpenOffers(self._blobs, self._admission, self._held),
            self._admission,
            derived.retention,
            members,
            announcer,
            notices,
            sentences,
            self._ordering.close,
        )
        counters, rejected = self._counters, self._admission.rejected
        return Parts(
            derived=derived,
            members=members,
            announcer=announcer,
            notices=notices,
            sentences=sentences,
            rounds=rounds,
            open_round=open_round,
            peers=Peers(ledger, self._admission, members, announcer, notices, derived, counters),
            view=RunView(
                ledger,
                rounds,
                members,
                derived,
                counters,
                rejected,
                self._refusals,
                self._wall_ms,
                LossUnit(self._loss_unit, derived.held_out_file()),
                self._admission.gate,
            ),
            over_s=now_s if rounds.is_over else None,
        )

    # ---------------------------------------------------------------------------------------- sessions

    def open(self, peer_id: str, session: int, hello: Hello, now_s: float) -> Welcome:
        """Admits the peer; its older session is over. `session` grows with every session of the peer's.

        Raises ConfigError (not let in), Incompatible (version, run, full swarm), LedgerCorrupt (a head
        that is not on the chain), BadMessage (a session older than the open one) or SwarmUnreachable (it was
        dropped).
        """
        self._check_leads()
        index = self._hearing.opened(peer_id, session, hello, now_s)
        return Welcome(
            genesis=self._ledger.genesis_record,
            signature=self._ledger.genesis_signature,
            head_round=self._ledger.head_round,
            head_digest=self._ledger.head_digest,
            kept_from=self._parts.derived.retention.kept_from,
            peer_index=index,
            heartbeat_s=self._settings.network.heartbeat_s,
        )

    def is_signed(self, peer_id: str, offer: Offer) -> bool:
        """Whether the peer has signed it. Takes its time, and may be asked from any thread."""
        return is_signed(peer_id, self._ledger.run_id, offer)

    def receive(self, peer_id: str, session: int, message: Message, now_s: float) -> None:
        """Raises BadMessage for what a peer must not send; frames of a replaced session are dropped."""
        if self._is_deaf:
            return
        index = self._parts.peers.index(peer_id)
        if index is None:
            raise self._admission.refused("not_admitted", BadMessage("no session is open"))
        with self._refusals.of(index):
            self._hearing.receive(index, session, message, now_s)

    def closed(self, peer_id: str, session: int, now_s: float) -> None:
        """The session's connection is over, for whatever reason."""
        index = self._parts.peers.index(peer_id)
        if index is not None and not self._is_deaf:
            self._hearing.closed(index, session, now_s)

    def is_member(self, peer_id: str) -> bool:
        """Whether the peer is admitted and connected: others may serve it blobs."""
        return not self._is_dropped and self._parts.peers.is_member(peer_id)

    def has_worked(self, peer_id: str) -> bool:
        """Whether work of the peer's has counted."""
        return self._parts.peers.has_worked(peer_id)

    def is_admitted(self, peer_id: str) -> bool:
        """Whether the peer has ever been let in."""
        return self._parts.peers.index(peer_id) is not None

    def scraped(self, now_s: float) -> list[str]:
        """Peers whose metrics are to be asked for, by their peer ids; see `Peers.scraped`."""
        return self._parts.peers.scraped(now_s)

    # ------------------------------------------------------------------------------------- lost commits

    def check(self, peer_id: str, hello: Hello) -> None:
        """Before anything else that a peer asks for. Raises ConfigError (not let in) or Incompatible."""
        self._admission.check_hello(peer_id, hello)

    def check_looker(self, shown: str) -> None:
        """Somebody with this token or invitation asks for the status. Raises ConfigError."""
        self._admission.gate.check_looker(shown)

    def hold(self) -> None:
        """From now on no round closes, until `go_on`: a commit made now might have been made before."""
        self._parts.rounds.is_held = True

    def adopt(self, commits: Sequence[Commit]) -> None:
        """Takes back commits that follow the head; between `hold` and `go_on`. All of them, or none.

        All sessions are over from then on: the caller ends them, so that their nodes come back. Raises
        BadMessage (not this coordinator's, not the next ones), LedgerCorrupt (a fork) or SwarmUnreachable
        (it was dropped).
        """
        self._check_leads()
        try:
            self._ledger.adopt(commits)
        except LedgerCorrupt as e:
            raise self._admission.refused("fork", e) from e
        except BadMessage as e:
            raise self._admission.refused("adopt", e) from e
        self._n_adopted += len(commits)

    def go_on(self, now_s: float) -> None:
        """Rounds close again. If there are adopted commits, it is as after a restart."""
        if self._is_dropped:
            return
        n_adopted, self._n_adopted = self._n_adopted, 0
        self._parts.rounds.is_held = self._log.is_over
        if n_adopted:
            back = counted(n_adopted, "commit")
            log.warning("got %s back from a node: round %d is the newest", back, self.head)
            self._admission.new_round()
            self._ordering.pending.take(None)
            self._recollection = Recollection(
                self._ledger, self._blobs, self._keep, self.history(), self._admission.rejected
            )
            self._parts = self._recalled(now_s)

    # ----------------------------------------------------------------------------------- the reign's end

    def drop(self) -> None:
        """This reign is over: the ledger goes on without it. Sessions that still end are not heard, and what
        waits for its turn changes nothing any more."""
        self._is_dropped = True

    @property
    def _is_deaf(self) -> bool:
        return self._is_dropped or self._n_adopted > 0

    def _check_leads(self) -> None:
        if self._is_dropped:
            raise SwarmUnreachable("this coordinator does not lead any more: come again")

    # --------------------------------------------------------------------------------------- the owner

    @property
    def course(self) -> Course:
        """What holds after the newest record."""
        return self._ordering.course

    def order(self, order: Order, now_s: float) -> Ordered:
        """Changes the run for everybody: with the record that closes the open round, or, where nobody works
        on one, with a record of its own at once. Raises ConfigError for what is refused."""
        return self._ordering.order(order, now_s)

    def name_committee(self, entry: CommitteeEntry, now_s: float) -> Ordered:
        """Who orders the run from the next round on, by the next record. If that are others, too, this reign
        ends with it. The first one also says who may come in, so that all seats know. Raises ConfigError."""
        return self._ordering.name_committee(entry, now_s)

    def reseat(self, seat: str, nonce: bytes, now_s: float) -> None:
        """A seat that has lost its votes, and is up to date, need not rest any more; see `Log.resting`, whose
        seats are named without being asked for. Raises ConfigError."""
        self._ordering.reseat(seat, nonce, now_s)

    @property
    def access(self) -> AccessEntry | None:
        """Who may come in, as the ledger or the next record has it; None: it is this seat's own matter."""
        return self._ordering.access

    def guard(
        self,
        banned: frozenset[str],
        token: str,
        told: Sequence[str],
        now_s: float,
        rules: EntryRules | None = None,
    ) -> Ordered:
        """Who may come in has changed, in these words. Sessions of those who are banned now end, and nobody
        waits for them. Where the ledger tells who may come in, the next record does. Raises ConfigError, with
        nothing changed, or, where this reign has ended by it, changed here alone."""
        return self._guarding.guard(banned, token, told, now_s, rules)

    # ------------------------------------------------------------------------------------------- blobs

    def may_store(self, peer_id: str, n_bytes: int) -> None:
        """Asked before a peer uploads a blob. Raises BadMessage: not a member, too much, no room."""
        index = self._parts.peers.index(peer_id)
        with self._refusals.of(index):
            self._may_store(index, peer_id, n_bytes)

    def _may_store(self, index: int | None, peer_id: str, n_bytes: int) -> None:
        if index is None or not self.is_member(peer_id):
            raise self._admission.refused("not_admitted", BadMessage("only members may store blobs"))
        self._admission.check_upload(index, n_bytes)
        if (why := self._parts.derived.retention.no_room(n_bytes, peer_id)) is not None:
            self.not_stored(peer_id, n_bytes)
            raise self._admission.refused("quota", BadMessage(why))

    def signatures(self, digest: bytes) -> bytes | None:
        """The blob that a commit names as its `work`."""
        return self._ledger.work(digest)

    def has_room(self, n_bytes: int) -> bool:
        """Whether so many bytes more fit into what the run may take of the disk."""
        return self._parts.derived.retention.has_room(n_bytes)

    def not_stored(self, peer_id: str, n_bytes: int) -> None:
        """For want of room an upload that was let in is not stored: the peer may try it again."""
        index = self._parts.peers.index(peer_id)
        if index is not None:
            self._admission.give_back(index, n_bytes)

    def blob_arrived(self, peer_id: str, digest: bytes, now_s: float) -> None:
        """The blob is in the store: offers that name it become eligible. Raises SwarmUnreachable (it was
        dropped): who leads now does not know of it yet."""
        self._check_leads()
        if not self._is_deaf:
            self._parts.open_round.blob_arrived(digest, now_s)

    def held_arrived(self, digest: bytes, now_s: float) -> None:
        """What `held` says of the blob may have changed: offers that name it become eligible."""
        if not self._is_deaf:
            self._parts.open_round.held_arrived(digest, now_s)

    # ---------------------------------------------------------------------------------- time and people

    def tick(self, now_s: float) -> float:
        """Lets time pass; returns when it wants to be called again at the latest, in monotonic seconds."""
        if self._is_deaf:
            return now_s + 1.0
        self._hearing.handle(TimePassed(), now_s)
        self._parts.open_round.handle(TimePassed(), now_s)
        parts = self._parts
        parts.notices.lines.flush()
        rounds = parts.rounds
        if self._log.resting and not (rounds.is_held or rounds.is_closing or rounds.is_over):
            self._ordering.pending.reseat.update(self._log.resting)
        is_free = not (rounds.is_held or rounds.is_awaited or rounds.is_closing)
        if self._ordering.pending and is_free:
            self._ordering.commit_changes(now_s)  # all who worked on the round are gone, and the owner waits
        parts.announcer.tell(parts.members, parts.open_round.offers.fetchable, now_s)
        round_s = parts.derived.statistics.round_s
        parts.notices.awaited(parts.rounds, self._settings.run.min_peers, round_s, now_s)
        parts.derived.page_history.rejected(self._wall_ms(), self._admission.rejected)
        parts.update_finished(now_s)
        wakes = [parts.members.wake_s(), parts.rounds.wake_s(), parts.notices.next_s, parts.announcer.next_s]
        if parts.over_s is not None and not parts.finished:
            wakes.append(parts.over_s + FAREWELL_S)
        return min(wake for wake in wakes if wake is not None)

    @property
    def finished(self) -> bool:
        """The last round is committed and every training peer has said that it has it, or time is up."""
        return self._parts.finished

    @property
    def proposed(self) -> int | None:
        """The round whose record waits for its seal: nobody knows what comes of it if the reign ends now."""
        return self._ordering.proposed

    @property
    def is_over(self) -> bool:
        """The last round is committed; nodes may still be fetching it."""
        return self._parts.rounds.is_over

    def last_snapshot(self) -> Wanted | None:
        """What is to be kept of the run's end, see `Wanted.of`."""
        newest, connected = self._parts.derived.retention.snapshots.newest(), self._parts.members.connected()
        return Wanted.of(self.course.run, newest, connected, self._ledger.peer_id)

    def commits(self, after: int, limit: int) -> list[Commit]:
        """At most `limit` commits from round `after` + 1 on, as they are stored."""
        return self._ledger.commits(after, limit)

    @property
    def head(self) -> int:
        """The newest committed round."""
        return self._ledger.head_round

    def excuse(self, peer_id: str, round_: int, now_s: float) -> None:
        """The peer will make no offer in this round: nobody waits for it."""
        index = self._parts.peers.index(peer_id)
        if index is not None and not self._is_deaf:
            self._parts.open_round.handle(Excused(index, round_), now_s)

    def count_rejected(self, reason: Rejected, peer_id: str | None = None) -> None:
        """Counts something that was not let in; reasons are few and fixed, they become metric labels.
        `peer_id`: whose it was, where that is certain."""
        with self._refusals.of(None if peer_id is None else self._parts.peers.index(peer_id)):
            self._admission.rejected[reason] += 1

    def status(self, now_s: float) -> dict[str, Any]:
        """JSON-able, for `thinwire status` and the live table. Times in seconds."""
        return self._parts.view.status(now_s)

    def peer(self, peer_id: str, now_s: float) -> dict[str, Any] | None:
        """JSON-able: what the status says of a peer; None: nobody was let in by this name."""
        index = self._parts.peers.index(peer_id)
        return None if index is None else self._parts.view.peer(index, peer_id, now_s)

    def overview(self, now_s: float) -> dict[str, Any]:
        """JSON-able and bounded, for the page."""
        return self._parts.view.overview(now_s)

    def trend(self, since: int) -> dict[str, Any]:
        """JSON-able and bounded: the points of the charts that have changed since that stamp."""
        return self._parts.view.trend(since)

    def history(self) -> bytes:
        """What only this process has seen of the run, to be kept over a restart; small."""
        return self._parts.view.history()

    def derived(self) -> bytes | None:
        """What follows from the ledger as it is now, for a checkpoint beside it; None: not now."""
        return None if self._is_deaf else self._recollection.saved()

    def memory(self) -> bytes:
        """What only a leader has seen and its successor wants to know, see `Recollection.remember`; some 100
        kB, at most MAX_MEMORY_BYTES."""
        return memory_of(self._ledger, self._parts.derived, self._parts.rounds)

    # ---------------------------------------------------------------------------------------- the parts

    def _leaves(self, index: int, now_s: float) -> None:
        if not self._is_deaf:
            self._hearing.leaves(index, now_s)

    # --------------------------------------------------------------------------------------- the commit

    def _committed(self, commit: Commit, closed: RoundClosed | None, now_s: float) -> None:
        """The record is on the disk: everybody may see it. `closed`: None, if it only brings changes."""
        parts = self._parts
        parts.derived.committed(commit, closed, parts.peers.present())
        opened = parts.rounds.sealed(now_s)
        parts.rounds.condemn(parts.derived.standing.condemned_in(commit.body.round + 1))
        parts.sentences.committed()
        if closed is not None:
            self._counters.round_closed(closed.why, closed.duration_s)
            self._fanout.round_took(closed.duration_s)
            parts.notices.missed(closed.missing, parts.derived.statistics)
            parts.notices.closed(closed, parts.rounds.is_over, now_s)
        self._admission.new_round()
        parts.over_s, parts.finished = (now_s if parts.rounds.is_over else None), False
        if commit.body.changes:
            parts.notices.changed(now_s)
        if commit.body.access is not None and self._ordering.pending.access is None:
            self._admission.gate.follow(commit.body.access)
        if self._log.is_over:
            self.hold()
        parts.open_round.act(opened, now_s)
        if self._ordering.pending:
            self._ordering.plan()
        self._on_commit(commit.body.round)
