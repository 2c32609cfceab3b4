"""What a seat knows of its run from the ledger, kept up to date commit by commit while another seat leads.

So a seat that is to lead does not read the ledger again: its service begins with this, and goes on with it.
"""

from __future__ import annotations

from collections import Counter

from ..blobs import BlobStore
from ..checkpoints.derived import outside, restored, saved
from ..derived_state import DerivedState
from ..ledger import Ledger
from ..observe.peer_names import PeerNames
from ..protocol.messages import Commit, Rejected
from ..protocol.settings import KEEP_SNAPSHOTS, Course, Keep
from .memory import Memory


class Recollection:
    """Of one seat's ledger; reads it once. While a service has it, that feeds it; else `feed` does, with
    every commit that is new in the ledger.

    Raises ConfigError for a config that it cannot read.
    """

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        keep: Keep = KEEP_SNAPSHOTS,
        history: bytes | None = None,
        rejected: Counter[Rejected] | None = None,
    ) -> None:
        """`history`: what only this seat's last process has seen, see `DerivedState.history`; `rejected`:
        counts so far, which go on."""
        self.rejected: Counter[Rejected] = Counter() if rejected is None else rejected
        self.names = PeerNames(ledger.peer_id)
        self._ledger, self._blobs = ledger, blobs
        self._around = outside(ledger, blobs, self.names, self.rejected, keep)
        self.derived = self._restored() or self._new(keep)
        for commit in ledger.all_commits(self.head):
            self.derived.recall(commit)
        self.derived.recalled()
        self.memory: Memory | None = None
        """The newest that a leader has told, or this seat as a leader."""
        if history is not None:
            self.derived.restore(history)

    def _restored(self) -> DerivedState | None:
        """As it was after a record that the ledger still has; None: nothing is kept, or in doubt."""
        checkpoint = self._ledger.checkpoint
        return None if checkpoint is None else restored(checkpoint.derived, self._around)

    def _new(self, keep: Keep) -> DerivedState:
        course = Course.of(self._ledger.genesis.config)
        return DerivedState(self._ledger, self._blobs, course, self.names.short, self.rejected, keep)

    def saved(self) -> bytes | None:
        """For a checkpoint of the ledger as it is now; None: it has records that are not known here yet."""
        if self.head != self._ledger.head_round:
            return None
        return saved(self.derived, self._blobs, self._around)

    @property
    def head(self) -> int:
        """The newest commit that it knows."""
        return self.derived.standing.round

    def feed(self, commit: Commit) -> None:
        """The next new commit, which is in the ledger; another seat has proposed it, or nobody knows who."""
        self.derived.followed(commit)

    def catch_up(self) -> None:
        """Feeds what the ledger has and this does not know."""
        while batch := self._ledger.commits(self.head, 256):
            for commit in batch:
                self.feed(commit)

    # ---------------------------------------------------------------------------------------- payloads

    def payload_arrived(self, digest: bytes) -> None:
        """A payload is in the store now: of the open round, or one that was missing."""
        retention = self.derived.retention
        if not retention.found(digest):
            retention.offered(digest, self.head + 1)

    def missing_payloads(self) -> dict[bytes, int]:
        """Payloads that the ledger names, that are still needed and not in the store, by the newest round
        that counts each; the oldest first."""
        return self.derived.retention.missing()

    def has_room(self, n_bytes: int) -> bool:
        """Whether so many bytes more fit into what the run may take of the disk."""
        return self.derived.retention.has_room(n_bytes)

    # --------------------------------------------------------------------------------- what leaders know

    def remember(self, packed: bytes) -> None:
        """What the leader sends now and then, see `Service.memory`. The last one is kept for this seat's own
        reign; losses and evaluations go into its ledger now. Raises BadMessage, with nothing changed."""
        memory = self.memory = Memory.parse(packed, self._ledger.run_id)
        has_evaluator, head = self.derived.reports.has_evaluator, self.head
        losses = [entry for entry in memory.held_out if entry[0] <= head and has_evaluator(entry[0])]
        has_eval = self.derived.course.settings.eval is not None
        evaluations = [
            (r, figures) for r, figures in memory.evaluations if has_eval and r <= head and figures
        ]
        for round_, loss in self._ledger.note_measured(losses, evaluations).items():
            self.derived.page_history.trend.held_out(round_, loss)

    def take_memory(self) -> Memory | None:
        """For the service that begins: what is shown goes on with it; the rest is for its rounds."""
        memory, self.memory = self.memory, None
        if memory is not None:
            if memory.history:
                self.derived.restore(memory.history.encode())
            self.derived.statistics.restore_durations(memory.durations_s, *memory.timed)
        return memory

    def reign_ended(self, memory: bytes) -> None:
        """The service that had this is gone: what sessions have told it, and no record has, is forgotten.
        Nodes say it again to whoever leads. `memory`: its own."""
        self.derived.forget_sessions()
        self.remember(memory)
