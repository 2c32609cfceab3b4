"""A snapshot that others vouch for, verified: the ledger is replayed up to its round, beside the training.

The replay has a replica of its own and a thread at the lowest priority that rests as long as it works. Every
byte is compared, not the fingerprint, which is no protection against forgers.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from ...compression.errors import ReplicaDiverged, SwarmUnreachable
from ..batches import batches
from ..joining import Joiner, Start
from ..links.base import Link
from ..replica import Replica
from ..snapshots.format import VERSION, ChunkDigests, Manifest, Stored, data_of

log = logging.getLogger("thinwire.node")

_NICE = 19


@dataclass(frozen=True, slots=True)
class Finding:
    """What a replay came to. `why`: of "unknown", the reason in words."""

    result: Literal["same", "other", "unknown"]
    why: str = ""


class Verification:
    """Of one snapshot, `target`, from the first of `starts` that works; begins at once. `spare`: makes the
    replica that replays, called in the thread."""

    def __init__(
        self,
        link: Link,
        joiner: Joiner,
        spare: Callable[[], Replica],
        target: Stored,
        starts: Sequence[Start],
    ) -> None:
        self._link, self._joiner, self._spare = link, joiner, spare
        self.target, self._starts = target, starts
        self._stop = threading.Event()
        self._finding: Finding | None = None
        self._thread = threading.Thread(target=self._run, name="verify", daemon=True)
        self._thread.start()

    @property
    def finding(self) -> Finding | None:
        """None: the replay goes on."""
        return self._finding

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the replay; what it would have found is not known then."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        _lowest_priority()
        try:
            self._finding = self._replayed()
        except Exception as e:  # noqa: BLE001 - the edge of a thread: training goes on whatever it was
            self._finding = Finding("unknown", f"{type(e).__name__}: {e}")

    def _replayed(self) -> Finding:
        replica = self._spare()
        start = self._begin(replica)
        ends = (self.target.round,)
        for commits in batches(self._link.records(start.round), replica.strategy, ends):
            began_s = time.monotonic()
            replica.apply_batch(commits, self._link.payload)
            if replica.round == self.target.round:
                return Finding("same" if _stored(replica).manifest == self.target.manifest else "other")
            if self._stop.wait(time.monotonic() - began_s):
                break
        return Finding("unknown", "the replay was stopped")

    def _begin(self, replica: Replica) -> Start:
        """Raises SwarmUnreachable when no start can be had."""
        why = "there is no start"
        for start in self._starts:
            try:
                self._joiner.put(replica, start)
            except (ReplicaDiverged, KeyError, OSError) as e:
                why = str(e)
                continue
            return start
        raise SwarmUnreachable(why)


def _stored(replica: Replica) -> Stored:
    """What a snapshot of the replica is called."""
    digests = ChunkDigests()
    for piece in data_of(replica.tensors()):
        digests.update(piece)
    manifest = Manifest(
        version=VERSION,
        run_id=replica.run_id,
        round=replica.round,
        commit=replica.digest,
        fingerprint=replica.fingerprint(),
        n_bytes=digests.n_bytes,
        chunks=digests.digests(),
        changes=replica.course.changes,
    )
    return Stored.of(manifest)


def _lowest_priority() -> None:
    """Of this thread, and of those that it starts. Where threads have none of their own nothing happens."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
