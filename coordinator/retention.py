"""Which payloads stay on the coordinator's disk, and from which round on (ARCHITECTURE.md, "Offers").

A counted payload is needed while its round is after the second newest attested snapshot, or is one that a
joining peer has said that it is going to apply. The coordinator verifies no snapshot, so what is attested
decides here; nodes go by what they have verified themselves (`node/links/payloads.py`). What is not needed
goes at once, or only to make room, or never: `Keep`. A quota is never exceeded: where it is full, what no
commit has counted goes first, then uploads that no offer names, of who has most of them. Then joining peers
lose what they were promised and take a newer snapshot, then what is before the newest snapshot goes, then,
though nobody has a snapshot that others vouch for, what is older than the nodes' own ones; after that,
payloads are refused. Where snapshots are to decide and there are none, a disk that is nearly full does the
same, but that nothing is refused. Payloads inside of commits stay for ever, in the ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any

from .blobs import BlobStore
from .protocol.attested import Snapshots
from .protocol.messages import CommitBody
from .protocol.settings import Keep
from .protocol.trust.standing import Standing

log = logging.getLogger("thinwire.coordinator")

LATE_ROUNDS = 4
"""A blob that no commit has counted is kept for this many rounds, and so is every counted one: offers are
sent again after a break, and nodes may be a few rounds behind."""

MAX_MISSING = 65_536
"""Payloads that are missed and remembered."""

REMINDER_ROUNDS = 64
"""Between two warnings that payloads pile up."""

MANY_BYTES = 20 * 10**9
"""Without a quota, blobs that take more than this are worth a warning."""

LEAST_FREE_BYTES = 500 * 10**6
"""Without a quota, payloads go before a disk has less."""

LEDGER_BYTES = 16 * 2**20
"""So much of the disk no payload gets: a coordinator that cannot write its ledger stops."""

REFUSALS_TOLD_EVERY = 100

OWN_SNAPSHOTS = 2
"""So many times `snapshot_every` rounds, nodes need the payloads to go on from snapshots of their own."""


class PayloadRetention:
    """Of one run. `name`: what a peer is called in the log; `standing`: of the peers, fed before this is."""

    def __init__(
        self,
        blobs: BlobStore,
        snapshot_every: int,
        name: Callable[[int], str],
        keep: Keep,
        standing: Standing,
    ) -> None:
        self._blobs, self._name, self._keep = blobs, name, keep
        self.snapshots = Snapshots(snapshot_every, standing)
        self._own_rounds = OWN_SNAPSHOTS * snapshot_every + LATE_ROUNDS
        self._needs: dict[int, int] = {}
        self._second_newest = 0
        self._released = 0
        """The newest round of which payloads were let go, or are given up."""
        self._missing: dict[bytes, int] = {}
        """Payloads that a commit names and that are not here, by the newest such round, in order."""
        self._head = 0
        self._n_refused = 0
        self._next_reminder = self._next_loss = 0

    @property
    def kept_from(self) -> int:
        """The payloads of this round and of all after it are here."""
        return self._incomplete + 1

    @property
    def _incomplete(self) -> int:
        return max(self._released, next(reversed(self._missing.values()), 0))

    def missing(self) -> dict[bytes, int]:
        """Payloads that should be here and are not, by the newest round that counts each, in order."""
        return dict(self._missing)

    def recall(self, body: CommitBody) -> None:
        """An old commit, in order: marks its payloads, as far as they are still here. Deletes nothing."""
        for offer in body.offers:
            if offer.digest is None:
                continue
            self._blobs.mark_counted(offer.digest, body.round)
            if offer.digest not in self._blobs:
                self._missing.pop(offer.digest, None)
                self._missing[offer.digest] = body.round
        self._look_at(body)
        self._give_up()

    def recall_marks(self, counted: Iterable[tuple[bytes, int]]) -> None:
        """Instead of the old commits: the payloads that were here after the newest of them, in order."""
        for digest, round_ in counted:
            self._blobs.mark_counted(digest, round_)
            if digest not in self._blobs:
                self._missing[digest] = round_
        self._missing = dict(sorted(self._missing.items(), key=lambda entry: entry[1]))
        self._give_up()

    def _give_up(self) -> None:
        """What nobody needs any more, or is too much to remember, is not missed."""
        while self._missing:
            digest, round_ = next(iter(self._missing.items()))
            if round_ > self._second_newest and len(self._missing) <= MAX_MISSING:
                return
            self._released = max(self._released, self._missing.pop(digest))

    def recalled(self, head: int) -> None:
        """After the last old commit: the other blobs belong to the round that was open."""
        self._blobs.mark_rest(head + 1)

    def offered(self, digest: bytes, round_: int) -> None:
        """The blob has arrived, or was here already, for an offer of this round."""
        self._blobs.mark_offered(digest, round_)
        self.found(digest)

    def named(self, digest: bytes) -> None:
        """An offer names the blob."""
        self._blobs.named(digest)

    def found(self, digest: bytes) -> bool:
        """The blob has arrived; whether a commit names it, and it was missed."""
        counted = self._missing.pop(digest, None)
        if counted is not None:
            self._blobs.mark_counted(digest, counted)
        return counted is not None

    def committed(self, body: CommitBody, present: Collection[int]) -> None:
        """A new commit: deletes what nobody needs any more. `present`: peers that are there or just away."""
        for offer in body.offers:
            if offer.digest is not None:
                self._blobs.mark_counted(offer.digest, body.round)
        self._look_at(body)
        self._let_go(present)

    def followed(self, body: CommitBody) -> None:
        """A new commit that another seat has proposed: as `committed`, and not all of its payloads need be
        here yet. Nobody joins here."""
        self.recall(body)
        self._let_go(())

    def _let_go(self, present: Collection[int]) -> None:
        self._needs = {peer: after for peer, after in self._needs.items() if peer in present}
        floor = 0 if self._keep.is_lazy else self._not_needed()[0]
        self._release(floor, self._head - LATE_ROUNDS)
        self.has_room(0)
        self._remind(self._head)

    def no_room(self, n_bytes: int, owner: str) -> str | None:
        """Why a peer's payload of this size cannot be stored; None: there is room for it, now at the latest.
        Uploads of who has more that no offer names, or has reserved more, give way."""
        while not self._fits(n_bytes) and self._blobs.drop_unnamed(owner, n_bytes):
            pass
        fits = self.has_room(n_bytes)
        while not fits and self._blobs.give_way(owner, n_bytes):
            fits = self.has_room(n_bytes)
        if fits:
            return None
        blobs, quota_bytes = self._blobs, self._keep.quota_bytes
        if self._is_full(n_bytes):
            text = "the coordinator's disk is full, but for what its ledger needs"
            remedy = "Make room on it"
        else:
            text = (
                f"the coordinator's quota is full: keep = {quota_bytes:,} bytes, {blobs.n_bytes:,} are taken "
                f"and {blobs.reserved_bytes:,} on their way, {n_bytes:,} more do not fit, and {self._why()}"
            )
            remedy = "Start the coordinator again with a larger [run] keep"
        if self._n_refused % REFUSALS_TOLD_EVERY == 0:
            log.error("a payload is refused: %s. %s", text, remedy)
        self._n_refused += 1
        return text

    def needs(self, peer: int, after: int) -> None:
        """A joining peer is going to apply the rounds after this one."""
        self._needs[peer] = after

    def welcomed(self, peer: int) -> None:
        """A peer was told `kept_from` and has not said yet what it needs: that much stays true."""
        self._needs[peer] = self._incomplete

    def needs_nothing(self, peer: int) -> None:
        """The peer trains, or leaves."""
        self._needs.pop(peer, None)

    def nobody_joins(self) -> None:
        """Nobody was promised anything."""
        self._needs.clear()

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
                "quota_bytes": self._keep.quota_bytes,
            },
        }

    def _look_at(self, body: CommitBody) -> None:
        self._head = body.round
        self.snapshots.committed(body)
        if body.snapshots:
            attested = self.snapshots.attested()
            second = attested[-2].round if len(attested) > 1 else 0
            self._second_newest = max(self._second_newest, second)

    def _not_needed(self) -> tuple[int, int, int, int]:
        """Up to which rounds payloads may go: because nobody needs them; although peers that join were
        promised them; although only the newest snapshot is a start without them; and although there is none
        but those that nodes have for themselves."""
        late, newest = self._head - LATE_ROUNDS, self.snapshots.newest()
        hard, attested = min(self._second_newest, late), min(newest.round if newest else 0, late)
        own = max(attested, self._head - self._own_rounds)
        return min([hard, *self._needs.values()]), hard, attested, own

    def has_room(self, n_bytes: int) -> bool:
        """Whether so many bytes fit below the quota, and onto the disk; old payloads are deleted as far as
        need be."""
        if not self._fits(n_bytes):
            self._release(0, self._head)
        for floor in self._not_needed():
            while not self._fits(n_bytes):
                oldest = self._blobs.oldest_counted()
                if oldest is None or oldest > floor:
                    break
                self._release(oldest, 0)
                self._tell_loss(oldest)
        return (self._fits(n_bytes) or self._keep.quota_bytes is None) and not self._is_full(n_bytes)

    def _fits(self, n_bytes: int) -> bool:
        """Whether nothing has to go for so many bytes more."""
        blobs, most_bytes = self._blobs, self._most_bytes()
        return most_bytes is None or blobs.n_bytes + blobs.reserved_bytes + n_bytes <= most_bytes

    def _is_full(self, n_bytes: int) -> bool:
        """Whether the ledger would lack room beside so many bytes more."""
        try:
            return n_bytes + self._blobs.reserved_bytes > self._blobs.free_bytes() - LEDGER_BYTES
        except OSError:  # whoever writes there says what is wrong
            return False

    def _most_bytes(self) -> int | None:
        """What blobs may take; None: whatever they take."""
        if self._keep.is_lazy:
            return self._keep.quota_bytes
        try:
            return self._blobs.n_bytes + self._blobs.free_bytes() - LEAST_FREE_BYTES
        except OSError:  # whoever writes there says what is wrong
            return None

    def _release(self, counted_to: int, offered_to: int) -> None:
        released = self._blobs.release(counted_to=counted_to, offered_to=offered_to)
        self._released = max(self._released, released)
        for peer, after in self._needs.items():
            if after < released:
                self._needs[peer] = self._incomplete
                log.warning(
                    "%s joins and was promised the payloads after round %d; for want of room those up to "
                    "round %d are gone: it has to take a newer snapshot",
                    self._name(peer),
                    after,
                    self._incomplete,
                )

    def _tell_loss(self, oldest: int) -> None:
        newest = self.snapshots.newest()
        if oldest <= (newest.round if newest else 0) or self._head < self._next_loss:
            return
        self._next_loss = self._head + REMINDER_ROUNDS
        log.error(
            "the %s full: payloads up to round %d are gone, and no snapshot of that round or later is "
            "attested: nobody new can join until one is, and nodes go on from snapshots of their own only. "
            "%s, and see why nodes attest none",
            "disk is nearly" if self._keep.quota_bytes is None else "quota is",
            oldest,
            "Make room, or start the coordinator elsewhere with a copy of its folder"
            if self._keep.quota_bytes is None
            else "Start the coordinator again with a larger [run] keep",
        )

    def _remind(self, round_: int) -> None:
        if self._keep.is_lazy or self._blobs.n_bytes <= MANY_BYTES or round_ < self._next_reminder:
            return
        self._next_reminder = round_ + REMINDER_ROUNDS
        log.warning(
            'blobs take %d bytes: %s. [run] keep = "50GB" would be a limit',
            self._blobs.n_bytes,
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
