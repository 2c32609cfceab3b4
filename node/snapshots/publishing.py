"""The snapshots that this node writes of its replica: written aside, announced, taken back when wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...coordinator.protocol.messages import Report
from ..history import History
from ..links.base import Link
from ..replica import Replica
from .format import Stored
from .store import SnapshotStore
from .verified import mark
from .writer import SnapshotWriter


@dataclass(slots=True)
class _Lineage:
    """What one start of the replica has led to. `snapshots`: on disk, the one that it began from included."""

    is_verified: bool
    is_given_up: bool = False
    snapshots: list[Stored] = field(default_factory=list)


class SnapshotPublisher:
    """Of one node in one run; `folder`: holds the store; `me`: its index. `close` at the end: it waits
    for what is written.

    Trust is inherited: what is written on a start that this node has not verified is not verified either,
    until `confirm`. Until `began` is called nothing is verified. Snapshots are announced once this node's own
    work has counted: nobody hears it before. Payloads back to the second newest verified snapshot are kept.
    """

    def __init__(
        self, link: Link, replica: Replica, history: History, folder: Path, *, me: Callable[[], int]
    ) -> None:
        self._link, self._replica, self._history, self._me = link, replica, history, me
        self._lock = threading.Lock()
        self._lineage = _Lineage(is_verified=False)
        self._written_for: dict[int, _Lineage] = {}
        self.store = SnapshotStore(folder, link.run_id)
        self._writer = SnapshotWriter(self.store, self._written)

    @property
    def is_verified(self) -> bool:
        """Whether the replica is what the ledger makes of base weights, or of a snapshot that this node has
        verified itself; a fault of this machine's apart."""
        return self._lineage.is_verified

    def began(self, stored: Stored | None, *, is_verified: bool) -> None:
        """The replica has a new start: a snapshot on this disk, or the base weights."""
        with self._lock:
            self._lineage = _Lineage(is_verified, snapshots=[] if stored is None else [stored])

    def confirm(self) -> None:
        """A replay has given the start of the replica: it and all that it has led to are verified."""
        with self._lock:
            self._lineage.is_verified = True
            for stored in self._lineage.snapshots:
                mark(self.store.folder_of(stored))
        self._keep_payloads()

    def give_up(self) -> None:
        """The start of the replica was wrong: it and all that it has led to are discarded."""
        with self._lock:
            self._lineage.is_given_up = True
            snapshots = list(self._lineage.snapshots)
        for stored in snapshots:
            self._take_back(stored)

    def write(self) -> None:
        """Of the replica as it is, unless it is stored already. Training goes on when the tensors are copied;
        what is on disk is announced."""
        round_ = self._replica.round
        if round_ == 0 or any(stored.round == round_ for stored in self.store.stored()):
            return
        with self._lock:
            if self._written_for.get(round_, self._lineage) is not self._lineage:
                return  # one of another start is on its way to the disk: which of them comes out is not known
            self._written_for[round_] = self._lineage
            for old in sorted(self._written_for)[:-8]:
                del self._written_for[old]
        self._replica.write_snapshot(self._writer)

    def announce(self, stored: Stored) -> None:
        """Others may fetch it from here. From any thread."""
        self._say(stored, stored.n_bytes)

    def discard(self, after: int) -> None:
        """What this node has written after this round may be wrong: it is taken back."""
        with self._lock:
            for lineage in (self._lineage, *self._written_for.values()):
                lineage.is_given_up = True
        for stored in self.store.stored():
            if stored.round > after:
                self._take_back(stored)

    def close(self) -> None:
        self._writer.close()

    def _written(self, stored: Stored) -> None:
        """On the writer's thread. What is written between the run's rounds for it is of use here only."""
        with self._lock:
            lineage = self._written_for.pop(stored.round, self._lineage)
            if not lineage.is_given_up:
                lineage.snapshots.append(stored)
                if lineage.is_verified:
                    mark(self.store.folder_of(stored))
        if lineage.is_given_up:
            self.store.discard(stored)
            return
        self._keep_payloads()
        if stored.round % self._history.every == 0:
            self.announce(stored)

    def _take_back(self, stored: Stored) -> None:
        self.store.discard(stored)
        self._say(stored, 0)

    def _say(self, stored: Stored, n_bytes: int) -> None:
        if self._history.standing.has_worked(self._me()):
            self._link.report(Report(round=stored.round, snapshot=stored.manifest, snapshot_bytes=n_bytes))

    def _keep_payloads(self) -> None:
        verified = [s.round for s in self.store.stored() if self.store.is_verified(s)]
        if len(verified) > 1:
            self._link.keep_payloads(verified[-2])
