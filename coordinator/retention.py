"""Which payloads stay on the coordinator's disk, and from which round on (ARCHITECTURE.md, "Offers").

A counted payload is kept while its round is after the second newest attested snapshot, or is one that a
joining peer has said that it is going to apply. Payloads inside of commits stay for ever, in the ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from .blobs import BlobStore
from .protocol.attested import Snapshots
from .protocol.messages import CommitBody

log = logging.getLogger("thinwire.coordinator")

LATE_ROUNDS = 4
"""A blob that no commit has counted is kept for this many rounds, and so is every counted one: offers are
sent again after a break, and nodes may be a few rounds behind."""

REMINDER_ROUNDS = 64
"""Between two warnings that the quota is exceeded."""


class PayloadRetention:
    """Of one run. `name`: what a peer is called in the log."""

    def __init__(self, blobs: BlobStore, snapshot_every: int, name: Callable[[int], str]) -> None:
        self._blobs, self._name = blobs, name
        self.snapshots = Snapshots(snapshot_every)
        self._needs: dict[int, int] = {}
        self._second_newest = 0
        self._incomplete = 0
        self._next_reminder = 0

    @property
    def kept_from(self) -> int:
        """The payloads of this round and of all after it are here."""
        return self._incomplete + 1

    def recall(self, body: CommitBody) -> None:
        """An old commit, in order: marks its payloads, as far as they are still here. Deletes nothing."""
        for offer in body.offers:
            if offer.digest is None:
                continue
            self._blobs.mark_counted(offer.digest, body.round)
            if offer.digest not in self._blobs:
                self._incomplete = body.round
        self._look_at(body)

    def recalled(self, head: int) -> None:
        """After the last old commit: the other blobs belong to the round that was open."""
        self._blobs.mark_rest(head + 1)

    def offered(self, digest: bytes, round_: int) -> None:
        """The blob has arrived, or was here already, for an offer of this round."""
        self._blobs.mark_offered(digest, round_)

    def committed(self, body: CommitBody, present: Collection[int]) -> None:
        """A new commit: deletes what nobody needs any more. `present`: peers that are there or just away."""
        for offer in body.offers:
            if offer.digest is not None:
                self._blobs.mark_counted(offer.digest, body.round)
        self._look_at(body)
        self._needs = {peer: after for peer, after in self._needs.items() if peer in present}
        late = body.round - LATE_ROUNDS
        floor = min([self._second_newest, late, *self._needs.values()])
        released = self._blobs.release(counted_to=floor, offered_to=late)
        self._incomplete = max(self._incomplete, released)
        self._remind(body.round)

    def needs(self, peer: int, after: int) -> None:
        """A joining peer is going to apply the rounds after this one."""
        self._needs[peer] = after

    def welcomed(self, peer: int) -> None:
        """A peer was told `kept_from` and has not said yet what it needs: that much stays true."""
        self._needs[peer] = self._incomplete

    def needs_nothing(self, peer: int) -> None:
        """The peer trains, or leaves."""
        self._needs.pop(peer, None)

    def figures(self, connected: Collection[int]) -> dict[str, Any]:
        """JSON-able: the newest attested snapshot and how many connected peers have it, and the payloads."""
        newest = self.snapshots.newest()
        snapshot = newest and {
            "round": newest.round,
            "bytes": newest.n_bytes,
            "holders": len(set(newest.peers).intersection(connected)),
        }
        return {
            "snapshot": snapshot,
            "payloads": {
                "kept_from": self.kept_from,
                "bytes": self._blobs.n_bytes - self._blobs.pinned_bytes,
                "quota_bytes": self._blobs.quota_bytes,
            },
        }

    def _look_at(self, body: CommitBody) -> None:
        self.snapshots.committed(body)
        if body.snapshots:
            attested = self.snapshots.attested()
            second = attested[-2].round if len(attested) > 1 else 0
            self._second_newest = max(self._second_newest, second)

    def _remind(self, round_: int) -> None:
        if self._blobs.n_bytes <= self._blobs.quota_bytes or round_ < self._next_reminder:
            return
        self._next_reminder = round_ + REMINDER_ROUNDS
        log.warning(
            "blobs take %d bytes, over the quota of %d: %s",
            self._blobs.n_bytes,
            self._blobs.quota_bytes,
            self._why(),
        )

    def _why(self) -> str:
        """What keeps the space occupied."""
        if self._second_newest == 0:
            return "all payloads are kept until there are two attested snapshots"
        peer, after = min(self._needs.items(), key=lambda entry: entry[1], default=(-1, self._second_newest))
        if after < self._second_newest:
            return f"{self._name(peer)} joins and needs the payloads after round {after}"
        return f"payloads are kept back to the second newest attested snapshot, round {self._second_newest}"
