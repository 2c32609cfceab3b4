"""Where a replica begins, and how it gets there: base weights, a snapshot of its own or one of the swarm's.

The ledger alone would do. A snapshot is taken where it is the cheaper way to the head: what counts are the
bytes that have to come over the network, snapshot and payloads together, and the work of applying rounds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..compression.errors import ReplicaDiverged, SwarmUnreachable, ThinwireError
from ..coordinator.protocol.attested import Attested
from ..coordinator.protocol.figures import counted, human_seconds
from ..coordinator.protocol.messages import BlobRef, Commit, NodeState
from .history import History
from .links.base import Link
from .replica import Replica, round_seed
from .snapshots.download import Progress, download
from .snapshots.format import CHUNK_BYTES, Stored, max_manifest_bytes
from .snapshots.store import LOCAL, SnapshotStore
from .states.kept_blobs import KeptBlobs
from .system.every import Every
from .units import human_bytes

log = logging.getLogger("thinwire.node")

_COORDINATOR = ""
"""As a holder of a snapshot: it keeps the last one of a run, for those who come when the nodes are gone."""

TELL_EVERY_S = 2.0
"""Seconds between two lines of progress."""


class NoStart(ThinwireError):
    """There is no way from anything that this node can have to the head of the ledger."""


class CatchingUp:
    """Tells how far behind a replica is, every few seconds. `round_`: where it began."""

    def __init__(self, round_: int) -> None:
        self._first_round, self._began_s = round_, time.monotonic()
        self._telling = Every(TELL_EVERY_S)

    def tell(self, round_: int, head: int) -> bool:
        """True when it has told something: then it is also time to look for a better way."""
        if round_ == self._first_round or not self._telling.is_due():
            return False
        rate = (round_ - self._first_round) / (time.monotonic() - self._began_s)
        log.info(
            "catching up: round %d of %d, %.1f rounds per second, about %s left",
            round_,
            head,
            rate,
            human_seconds((head - round_) / rate),
        )
        return True


@dataclass(frozen=True, slots=True)
class Start:
    """The replica after `round`. `cost_bytes`: to be fetched for it, and for the rounds from there on.

    `stored`: a snapshot on this node's disk; `attested`: one that the ledger vouches for; neither: the base
    weights. `is_verified`: the one on the disk is what a replay of this node's gave.
    """

    round: int
    cost_bytes: int
    stored: Stored | None = None
    attested: Attested | None = None
    is_verified: bool = False

    @property
    def is_trusted(self) -> bool:
        """Whether nobody's word but the ledger's is taken for it: base weights, or verified by this node."""
        return self.kind == "base" or self.is_verified

    @property
    def is_proof(self) -> bool:
        """Whether, beyond that, what comes out of a replay from here needs no check: a fault of this
        machine's before it was written would have shown."""
        return self.kind == "base" or (self.is_verified and self.attested is not None)

    @property
    def kind(self) -> Literal["base", "own", "swarm"]:
        if self.stored is not None:
            return "own"
        return "base" if self.attested is None else "swarm"


class Joiner:
    """Brings a replica to a start. `base`: the run's base weights, None: exact initialisation; `kept_from`:
    the first round whose payloads the coordinator still has; `base_blobs`: where the base weights come from,
    None: from the coordinator each time; `me`: this node's index in commits,
    -1: it has none yet, or reports nothing."""

    def __init__(
        self,
        link: Link,
        replica: Replica,
        store: SnapshotStore,
        history: History,
        *,
        base: BlobRef | None,
        base_blobs: KeptBlobs | None = None,
        kept_from: int,
        stopped: Callable[[], bool],
        me: Callable[[], int] = lambda: -1,
    ) -> None:
        self._link, self._replica, self._store, self._history = link, replica, store, history
        self._base, self._kept_from, self._stopped = base, kept_from, stopped
        self._base_blobs = base_blobs or KeptBlobs(link, None)
        self._me = me
        self.stored: Stored | None = None
        """The snapshot on this node's disk that `begin` has begun at; None: the base weights."""
        self._useless: set[tuple[int, bytes]] = set()
        self._wrong: set[bytes] = set()

    def read_ledger(self) -> None:
        """Brings the history up to the head that is known now. Raises what the link raises."""
        head, telling = self._link.head, Every(TELL_EVERY_S)
        for commit in self._link.records(self._history.round):
            self._history.add(commit)
            if telling.is_due():
                log.info("reading the ledger: record %d of %d", self._history.round, head)

    def starts(self) -> list[Start]:
        """All that lead to the head: first the snapshots that this node has verified, then the cheapest; of
        two that cost the same the newer one."""
        found = [start for start in self._candidates() if self._leads_to_head(start)]
        return sorted(found, key=lambda start: (not start.is_verified, start.cost_bytes, -start.round))

    def kept_from(self) -> int:
        """Payloads of this round and of later ones can be had."""
        return max(self._kept_from, self._history.kept_from())

    def payloads_gone(self, round_: int) -> None:
        """A payload of this round cannot be had, whatever the coordinator said."""
        self._kept_from = max(self._kept_from, round_ + 1)

    def begin(
        self, starts: Callable[[], list[Start]] | None = None, *, with_local_state: bool = True
    ) -> Start:
        """Brings the replica to the best start that works. Raises NoStart, and what the link raises."""
        while True:
            able = (starts or self.starts)()
            if not able:
                raise NoStart(
                    f"no way to the head of the run (round {self._link.head}): payloads of the rounds before "
                    f"{self.kept_from()} are gone, and no snapshot of a later round can be had. Start this "
                    f"node again once another one trains; snapshots come every {self._history.every} rounds."
                )
            start = able[0]
            self._link.state(NodeState.JOINING, needs_after=start.round)
            try:
                self._go_to(start, with_local_state)
            except (ReplicaDiverged, SwarmUnreachable, OSError) as e:
                if self._stopped() or start.kind == "base":
                    raise
                log.warning("the snapshot after round %d cannot be used: %s", start.round, e)
                self._give_up(start)
                continue
            return start

    def trusted_starts(self, at_most: int) -> list[Start]:
        """Starts at this round or before of which nobody's word is taken; the newest first."""
        found = [s for s in self._candidates() if s.round <= at_most and s.is_trusted]
        return [s for s in sorted(found, key=_newest_first) if self._leads_to_head(s)]

    def own_starts(self, at_most: int, *, verified: bool) -> list[Start]:
        """Starts at this round or before for a replay that shows whether this machine has made a fault since;
        the newest first. Of snapshots only those on this disk that others have, too.

        `verified`: only trusted ones. A replica that itself is not verified takes nobody's word anew when it
        begins again at a snapshot that it had come from, or had led to.
        """
        found = [s for s in self._candidates() if s.round <= at_most and s.kind != "swarm"]
        able = [s for s in found if (s.is_trusted or not verified) and self._is_shared(s)]
        return [s for s in sorted(able, key=_newest_first) if self._leads_to_head(s)]

    def was_wrong(self, manifest: bytes) -> None:
        """A replay has given something else than the snapshot with this manifest: it is never a start
        again."""
        self._wrong.add(manifest)

    def is_worth_it(self) -> bool:
        """Whether a newer snapshot is by now a cheaper way to the head than going on from here."""
        best = next(iter(self.starts()), None)
        return (
            best is not None
            and best.round > self._replica.round
            and best.cost_bytes < self._history.cost_bytes(self._replica.round)
        )

    # --------------------------------------------------------------------------------------- candidates

    def _candidates(self) -> list[Start]:
        history = self._history
        base_bytes = 0 if self._base is None else self._base.n_bytes
        found = [Start(0, base_bytes + history.cost_bytes(0))]
        stored = {s.manifest: s for s in self._store.stored() if self._is_on_ledger(s)}
        others = {a.round: a.manifest for a in history.snapshots.attested()}
        for attested in history.attested():
            here = stored.pop(attested.manifest, None)
            cost_bytes = history.cost_bytes(attested.round) + (0 if here is not None else attested.n_bytes)
            is_verified = here is not None and self._store.is_verified(here)
            found.append(Start(attested.round, cost_bytes, here, attested, is_verified))
        for own in stored.values():
            is_verified = self._store.is_verified(own)
            # One beside another that is attested, and nothing but others' word in both.
            if is_verified or others.get(own.round, own.manifest) == own.manifest:
                cost_bytes = history.cost_bytes(own.round)
                found.append(Start(own.round, cost_bytes, own, is_verified=is_verified))
        return [s for s in found if self._key(s) not in self._useless and not self._is_wrong(s)]

    def _is_wrong(self, start: Start) -> bool:
        manifests = {s.manifest for s in (start.stored, start.attested) if s is not None}
        return not manifests.isdisjoint(self._wrong)

    def _is_shared(self, start: Start) -> bool:
        """Whether others had the same state then, as far as they have said."""
        stored, verdicts = start.stored, self._history.verdicts
        if stored is None or start.attested is not None:
            return True
        return verdicts.is_shared(self._me(), stored.round, stored.fingerprint)

    def _is_on_ledger(self, stored: Stored) -> bool:
        return self._history.digest_at(stored.round) == stored.commit

    def _leads_to_head(self, start: Start) -> bool:
        first, kept_from = self._history.first_blob(start.round), self.kept_from()
        return first is None or first >= kept_from or self._are_here(start.round, kept_from)

    def _are_here(self, after: int, before: int) -> bool:
        """Whether this node has kept all payloads of the rounds between these two."""
        for commit in self._link.records(after):
            if commit.body.round >= before:
                return True
            digests = [offer.digest for offer in commit.body.offers if offer.digest is not None]
            if not all(map(self._link.has_payload, digests)):
                return False
        return True

    def _give_up(self, start: Start) -> None:
        """Not to be tried again; what is damaged on disk is thrown away, the swarm's copy may still do."""
        if start.stored is not None:
            self._store.discard(start.stored)
        else:
            self._useless.add(self._key(start))

    @staticmethod
    def _key(start: Start) -> tuple[int, bytes]:
        return start.round, b"" if start.attested is None or start.stored else start.attested.manifest

    # ------------------------------------------------------------------------------------- going there

    def _go_to(self, start: Start, with_local_state: bool) -> None:
        stored = self.stored = None if start.kind == "base" else start.stored or self._fetch(start)
        self._put(self._replica, stored)
        if stored is None:
            return
        if with_local_state and start.kind == "own":
            self._take_local_state(stored)
        log.info(
            "took the replica after round %d from %s (%s)",
            start.round,
            "this node's disk" if start.kind == "own" else "the swarm",
            human_bytes(stored.n_bytes),
        )

    def put(self, replica: Replica, start: Start) -> None:
        """Another replica of the run becomes what this start is: base weights, or a snapshot on this disk.
        From any thread. Raises what `Replica.take` and the link raise."""
        self._put(replica, start.stored)

    def _put(self, replica: Replica, stored: Stored | None) -> None:
        if stored is None:
            self._begin_anew(replica)
            return
        if replica.has_frozen:
            self._begin_anew(replica)
        replica.take(self._store, stored, self._commit(stored.round))
        if replica.course.changes != self._history.changes_at(stored.round):
            raise ReplicaDiverged("its settings are not those of the ledger")
        replica.peers = dict(self._history.peers)

    def _begin_anew(self, replica: Replica) -> None:
        base = None
        if self._base is not None:
            if not self._base_blobs.has(self._base):
                log.info("fetching the base weights (%s)", human_bytes(self._base.n_bytes))
            base = self._base_blobs.get(self._base)
        replica.begin(base)
        replica.peers = {}

    def _commit(self, round_: int) -> Commit:
        commit = next(self._link.records(round_ - 1), None)
        if commit is None:
            raise SwarmUnreachable("the link was closed")
        return commit

    def _take_local_state(self, stored: Stored) -> None:
        """Momentum and the like: best effort, the replica is whole without it."""
        folder = self._store.folder_of(stored)
        try:
            if not self._replica.take_local_state(folder) and any(folder.glob(f"{LOCAL}*")):
                log.info("the local state beside the snapshot is of another number of ranks: left out")
        except (ThinwireError, OSError) as e:
            log.warning("the local state beside the snapshot cannot be used (%s): starting without it", e)

    def _fetch(self, start: Start) -> Stored:
        attested = start.attested
        assert attested is not None
        reporters = self._history.holders(attested)

        def members() -> list[str]:
            """Who reported it comes first; others may have it by now as well."""
            found = self._link.members()
            return sorted(found, key=lambda peer_id: (peer_id not in reporters, peer_id))

        manifest, giver = self._manifest(attested, [*members(), _COORDINATOR])
        also = [giver] if giver == _COORDINATOR else []

        def holders() -> list[str]:
            return members() + also

        incoming = self._store.incoming(manifest)
        telling = Every(TELL_EVERY_S, at_once=True)

        def tell(progress: Progress) -> None:
            if telling.is_due():
                log.info("%s", _told(start.round, self._link.head, progress))

        download(
            incoming,
            holders,
            lambda chunk, digest, holder: self._link.fetch(
                digest, CHUNK_BYTES, holder or None, base=self._store.earlier_chunk(chunk, incoming.manifest)
            ),
            tell,
            self._stopped,
            seed=round_seed(self._link.run_id, start.round, self._link.peer_id),
        )
        if self._stopped():
            raise SwarmUnreachable("stopped")
        return incoming.finish()

    def _manifest(self, attested: Attested, holders: list[str]) -> tuple[bytes, str]:
        """From whoever gives it, and who that was. Raises SwarmUnreachable with the last one's reason."""
        log.info("fetching the snapshot after round %d (%s)", attested.round, human_bytes(attested.n_bytes))
        why = "nobody who has it is connected"
        for holder in holders:
            try:
                most = max_manifest_bytes(attested.n_bytes)
                return self._link.fetch(attested.manifest, most, holder or None), holder
            except SwarmUnreachable as e:
                why = why if holder == _COORDINATOR else str(e)
        raise SwarmUnreachable(why)


def _newest_first(start: Start) -> tuple[int, int]:
    return -start.round, start.cost_bytes


def _told(round_: int, head: int, progress: Progress) -> str:
    rate = f"nothing comes from {counted(len(progress.holders), 'peer')} now"
    if progress.rate_bytes_per_s >= 1:
        left_s = (progress.total_bytes - progress.n_bytes) / progress.rate_bytes_per_s
        rate = (
            f"{human_bytes(progress.rate_bytes_per_s)}/s from {counted(len(progress.holders), 'peer')}, "
            f"{human_seconds(left_s)} left"
        )
    return (
        f"snapshot after round {round_} ({counted(head - round_, 'round')} behind): "
        f"{human_bytes(progress.n_bytes)} of {human_bytes(progress.total_bytes)}, {rate}"
    )
