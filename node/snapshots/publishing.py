"""The snapshots that this node writes of its replica: written aside, announced, taken back when wrong."""

from __future__ import annotations

from pathlib import Path

from ...coordinator.protocol.messages import Report
from ..history import History
from ..links.base import Link
from ..replica import Replica
from .format import Stored
from .store import SnapshotStore
from .writer import SnapshotWriter


class SnapshotPublisher:
    """Of one node in one run; `folder`: holds the store. `close` at the end: it waits for what is written."""

    def __init__(self, link: Link, replica: Replica, history: History, folder: Path) -> None:
        self._link, self._replica, self._history = link, replica, history
        self.store = SnapshotStore(folder, link.run_id)
        self._writer = SnapshotWriter(self.store, self._written)

    def write(self) -> None:
        """Of the replica as it is, unless it is stored already. Training goes on when the tensors are copied;
        what is on disk is announced."""
        round_ = self._replica.round
        if round_ == 0 or any(stored.round == round_ for stored in self.store.stored()):
            return
        self._replica.write_snapshot(self._writer)

    def announce(self, stored: Stored) -> None:
        """Others may fetch it from here. From any thread."""
        self._link.report(Report(round=stored.round, snapshot=stored.manifest, snapshot_bytes=stored.n_bytes))

    def discard(self, after: int) -> None:
        """What this node has written after this round may be wrong, unless others have it, too: it is taken
        back."""
        for stored in self.store.stored():
            if stored.round > after and not self._history.is_shared(stored.manifest):
                self.store.discard(stored)
                self._link.report(Report(round=stored.round, snapshot=stored.manifest, snapshot_bytes=0))

    def close(self) -> None:
        self._writer.close()

    def _written(self, stored: Stored) -> None:
        """On the writer's thread. What is written between the run's rounds for it is of use here only."""
        if stored.round % self._history.every == 0:
            self.announce(stored)
