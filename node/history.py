"""What a node knows from the ledger so far: peers, snapshots, fingerprints, and what a replay costs.

Pure: fed with every commit from round 1 on, in order, whether the replica has applied it or not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..coordinator.protocol.attested import Attested, Snapshots
from ..coordinator.protocol.messages import Change, Changes, Commit
from ..coordinator.protocol.settings import in_order
from ..coordinator.protocol.trust.standing import Standing
from .verdicts import Verdicts

if TYPE_CHECKING:
    from .replica import Replica

ROUNDS_PER_MODEL = 16
"""Rounds that are decoded and applied in the time in which the model could be fetched: about right for a CPU
of today on a line of 20 to 50 Mbit/s."""


class History:
    """`peers`: index -> peer id. `run_id` stands for the digest of record 0; `round_cost_bytes`: bytes that
    could be fetched in the time that it takes to apply a round with payloads to be fetched. `standing`: that
    of the replica, which follows the same commits."""

    def __init__(
        self, run_id: bytes, snapshot_every: int, round_cost_bytes: int, standing: Standing | None = None
    ) -> None:
        self.every = snapshot_every
        self._round_cost_bytes = round_cost_bytes
        self.peers: dict[int, str] = {}
        self._indices: dict[str, int] = {}
        self.standing = standing or Standing(run_id)
        self.snapshots = Snapshots(snapshot_every, self.standing)
        self.verdicts = Verdicts(self.standing)
        self._digests = [run_id]
        self._costs = [0]
        self._changes: dict[str, Change] = {}
        self._changed: list[tuple[int, Changes]] = []

    @classmethod
    def of(cls, replica: Replica, snapshot_every: int) -> History:
        """For a replica whose size tells what a round costs."""
        cost_bytes = replica.n_bytes // ROUNDS_PER_MODEL
        return cls(replica.run_id, snapshot_every, cost_bytes, replica.standing)

    @property
    def round(self) -> int:
        """The newest round that is known."""
        return len(self._digests) - 1

    def add(self, commit: Commit) -> None:
        """The next commit; one that is known already changes nothing."""
        body = commit.body
        if body.round <= self.round:
            return
        assert body.round == self.round + 1, "links give commits in order"
        self.peers.update({a.index: a.peer_id for a in body.admitted})
        self._indices.update({a.peer_id: a.index for a in body.admitted})
        self.standing.committed(body, commit.digest)
        self.snapshots.committed(body)
        self.verdicts.committed(body)
        self._digests.append(commit.digest)
        if body.changes:
            self._changes.update((change.key, change) for change in body.changes)
            self._changed.append((body.round, in_order(self._changes)))
        n_bytes = sum(offer.n_bytes for offer in body.offers if offer.digest is not None)
        self._costs.append(self._costs[-1] + (n_bytes and n_bytes + self._round_cost_bytes))

    def index_of(self, peer_id: str) -> int | None:
        """Of a peer, as a commit has admitted it; None: none has yet."""
        return self._indices.get(peer_id)

    def digest_at(self, round_: int) -> bytes | None:
        """Digest of the record of this round; None: it is not known."""
        return self._digests[round_] if 0 <= round_ <= self.round else None

    def changes_at(self, round_: int) -> Changes:
        """What records up to this round have changed of the run's settings, the last one of each key."""
        i = bisect_right(self._changed, round_, key=lambda entry: entry[0])
        return self._changed[i - 1][1] if i else ()

    def cost_bytes(self, after: int) -> int:
        """What it costs to apply every known round after this one: bytes to be fetched, and the work."""
        return self._costs[-1] - self._costs[min(after, self.round)]

    def first_blob(self, after: int) -> int | None:
        """The first known round after this one that has a payload to be fetched."""
        if self.cost_bytes(after) == 0:
            return None
        return bisect_right(self._costs, self._costs[after])

    def kept_from(self) -> int:
        """The coordinator may have thrown away the payloads of the rounds before this one."""
        attested = self.snapshots.attested()
        return attested[-2].round + 1 if len(attested) > 1 else 1

    def attested(self) -> list[Attested]:
        """The newest attested snapshots, in order. While replicas differ, one peer's word alone is none."""
        open_from = self.verdicts.open_from()
        return [
            a
            for a in self.snapshots.attested()
            if len(a.peers) > 1 or open_from is None or a.round < open_from
        ]

    def names(self, peers: Iterable[int]) -> str:
        """Their peer ids, for people."""
        return ", ".join(self.peers.get(index, f"peer {index}") for index in sorted(peers))

    def holders(self, snapshot: Attested) -> list[str]:
        """Peer ids of those that reported the snapshot."""
        return [self.peers[index] for index in snapshot.peers if index in self.peers]
