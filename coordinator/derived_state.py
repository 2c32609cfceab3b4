"""What a coordinator derives from the ledger: fed with its commits in order, old ones and new ones.

All of it is known again after a restart, and whoever follows a ledger can keep it up to date.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

from ..compression.errors import ConfigError
from .blobs import BlobStore
from .ledger import Ledger
from .observe.page_history import PageHistory
from .observe.peer_sizes import PeerSizes
from .observe.run_statistics import RunStatistics
from .protocol.messages import AccessEntry, Commit, CommitBody, CommitteeEntry, Gossiping, Rejected
from .protocol.schedule import Samples
from .protocol.settings import Course, Keep
from .protocol.trust.governing import Governing
from .protocol.trust.standing import Standing
from .reports import Reports
from .retention import PayloadRetention
from .rounds import RoundClosed
from .trust.audit_reports import AuditReports

RECALLED_COMMITS = 3
"""The peers of this many last commits stay expected for a while after a restart."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """What the open round needs to know of those before.

    `training`: peers of the last commits; `evaluator`: the last one named; `evaluates`: the head's;
    `has_begun`: a round has been trained.
    """

    training: frozenset[int]
    evaluator: int | None
    evaluates: int | None
    has_begun: bool


class DerivedState:
    """Of one run. `course`: as record 0 says; `name`: what a peer is called in the log; `rejected`: counts so
    far, by reason.

    Old commits are recalled, then `recalled`; new ones come by `committed`, if this coordinator proposed
    them, else by `followed`.
    """

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        course: Course,
        name: Callable[[int], str],
        rejected: Counter[Rejected],
        keep: Keep,
    ) -> None:
        self._ledger, self._blobs, self._name = ledger, blobs, name
        self.course = course
        """After the newest commit."""
        self.samples = Samples()
        """Of the newest rounds."""
        n_params = sum(prod(entry.shape) for entry in ledger.genesis.layout)
        self.statistics = RunStatistics(n_params)
        self.page_history = PageHistory(n_params, rejected)
        self._governing = Governing(ledger.genesis.coordinator)
        self.standing = Standing(ledger.run_id, course.settings.audits)
        self.audits = AuditReports(self.standing, ledger.peer_id, rejected)
        self.peer_sizes = PeerSizes(self.standing.has_worked, self.statistics.has_offered)
        self.gossip: dict[int, Gossiping] = {}
        """What nodes have told of their exchanges with neighbours, by index."""
        self.retention = PayloadRetention(blobs, course.run.snapshot_every, name, keep, self.standing)
        snapshots, trend = self.retention.snapshots, self.page_history.trend
        self.reports = Reports(ledger, self.statistics, trend, snapshots, self.standing, rejected, course)
        self._last_peers: deque[frozenset[int]] = deque(maxlen=RECALLED_COMMITS)
        self._evaluator: int | None = None
        self._evaluates: int | None = None
        self.peers: dict[int, str] = {}
        """Whom the records have admitted: by index, the peer id."""
        self.committee: CommitteeEntry | None = None
        """As the newest record has it that names one."""
        self.recovery = ledger.genesis.recovery
        """See CommitteeEntry."""
        self.access: AccessEntry | None = None
        """As the newest record has it that says who may come in."""

    def recall(self, commit: Commit) -> None:
        """The next old commit. Deletes no payload."""
        self._read(commit)
        self.retention.recall(commit.body)

    def recalled(self) -> None:
        """After the last old commit."""
        for round_, loss in self._ledger.held_out():
            self.page_history.trend.held_out(round_, loss)
        self._pin_blobs_of_run()
        self.retention.recalled(self._ledger.head_round)

    def followed(self, commit: Commit) -> None:
        """The next new commit, which another coordinator has proposed; payloads that nobody needs any more
        are deleted."""
        self._read(commit)
        self.retention.followed(commit.body)

    def _read(self, commit: Commit) -> None:
        body = commit.body
        self._follow(commit)
        self.statistics.committed(body)
        self.page_history.committed(commit)
        self.reports.recall(body, self.course)

    def open_round(self) -> Recalled:
        """What the round after the newest commit needs to know. Raises ConfigError if a blob of the run's own
        is not in the store."""
        missing = self._pin_blobs_of_run()
        if missing:
            raise ConfigError(f"blob {missing[0].hex()} of the run is missing: put it into the blob store")
        training = frozenset[int]().union(*self._last_peers)
        return Recalled(training, self._evaluator, self._evaluates, has_begun=bool(self._last_peers))

    def committed(self, commit: Commit, closed: RoundClosed | None, present: Collection[int]) -> None:
        """The next new commit, on the disk already; payloads that nobody needs any more are deleted.

        `closed`: None for a record that only brings changes; `present`: peers that are there, or were a
        moment ago.
        """
        body = commit.body
        self._follow(commit)
        self.statistics.committed(body)
        self.page_history.committed(commit)
        if closed is not None:
            self.page_history.closed(closed.why, closed.duration_s)
            self.statistics.round_closed(closed.duration_s, closed.missing)
        self.reports.committed(body, self.course)
        self.retention.committed(body, present)

    def forget_sessions(self) -> None:
        """What was said in sessions and is in no record."""
        self.reports.forget_pending()
        self.audits.forget_pending()
        self.retention.nobody_joins()

    def _follow(self, commit: Commit) -> None:
        body = commit.body
        self.standing.committed(body, commit.digest)
        self.audits.committed()
        self.samples = self.samples.after(body.offers)
        self.peers.update((admission.index, admission.peer_id) for admission in body.admitted)
        if body.committee is not None:
            self.committee = body.committee
            self.recovery = self.recovery or body.committee.recovery
        self.access = body.access or self.access
        if body.offers:
            self._last_peers.append(frozenset(offer.peer for offer in body.offers))
        self._evaluates = body.evaluator
        self._evaluator = self._evaluator if body.evaluator is None else body.evaluator
        self._tell_judged(body)
        for text in (*self._governing.follow(commit), *self.course.told(body.changes)):
            self.page_history.happened(body.time_ms, "changed", f"round {body.round}: {text}")
        self.course = self.course.after(body.changes)

    def _tell_judged(self, body: CommitBody) -> None:
        condemned, back = self.standing.changed()
        for peer in condemned:
            last = self.standing.condemned_until(peer)
            text = f"{self._name(peer)}: its offers up to round {last} do not count"
            self.page_history.happened(body.time_ms, "condemned", text)
        for peer in back:
            self.page_history.happened(body.time_ms, "joined", f"{self._name(peer)} again, after its term")

    @property
    def last_ms(self) -> int:
        """When the newest record was made, by the clock of whoever proposed it: no later one says less."""
        last_ms = self.statistics.last_commit_ms
        return self._ledger.genesis.time_ms if last_ms is None else last_ms

    def history(self) -> bytes:
        """What only this process has seen of the run; small."""
        return self.page_history.saved(self._ledger.run_id.hex(), self.statistics.saved_traffic())

    def restore(self, history: bytes) -> None:
        """What `history` gave before a restart; after `recalled`."""
        traffic = self.page_history.restore(history, self._ledger.run_id.hex())
        self.statistics.restore_traffic(traffic)

    def held_out_file(self) -> BinaryIO | None:
        """The run's held-out data; None: it has none."""
        ref = self._ledger.genesis.held_out
        return None if ref is None else self._blobs.open(ref.digest)

    def _pin_blobs_of_run(self) -> list[bytes]:
        """Returns those that are not here."""
        genesis = self._ledger.genesis
        refs = [ref.digest for ref in (genesis.base, genesis.held_out, genesis.corpus) if ref is not None]
        for digest in refs:
            if digest in self._blobs:
                self._blobs.pin(digest)
        return [digest for digest in refs if digest not in self._blobs]
