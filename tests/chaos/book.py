"""The ledger as an onlooker reads it: from the coordinator's database, while it runs or after it died."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from thinwire.coordinator.protocol.messages import CommitBody, decode_record


class Book:
    """All commits so far, in order: `commits[r - 1]` is round r's, and beside it `records` and `digests`.

    `read` takes in what is new; a ledger that was put back to an older copy is read from its start again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.records: list[bytes] = []
        self.commits: list[CommitBody] = []
        self.digests: list[bytes] = []
        self.indices: dict[str, int] = {}
        self.fingerprints: dict[int, dict[int, bytes]] = {}

    @property
    def head(self) -> int:
        """The newest round that was read."""
        return len(self.commits)

    def read(self) -> int:
        """Returns the head."""
        if not self._path.exists():
            return self.head
        with closing(self._connect()) as db:
            head = db.execute("SELECT digest FROM record WHERE round = ?", (self.head,)).fetchone()
            if self.head and (head is None or head[0] != self.digests[-1]):
                self._forget()
            rows = db.execute(
                "SELECT record, digest FROM record WHERE round > ? ORDER BY round", (self.head,)
            ).fetchall()
        for record, digest in rows:
            self._take(record, digest)
        return self.head

    def counted(self, peer: int, after: int) -> bool:
        """Whether an offer of this peer counted in a round after that one."""
        return any(offer.peer == peer for body in self.commits[after:] for offer in body.offers)

    def n_offers(self, after: int, to: int) -> int:
        """Offers that counted in the rounds from `after` + 1 to `to`."""
        return sum(len(body.offers) for body in self.commits[after:to])

    def durations_s(self, after: int, to: int | None = None) -> list[float]:
        """Seconds from each commit to the next, by the coordinator's clock."""
        times_ms = [body.time_ms for body in self.commits[after:to]]
        return [(b - a) / 1000 for a, b in pairwise(times_ms)]

    def disagreements(self) -> Iterator[tuple[int, dict[int, bytes]]]:
        """Rounds for which peers reported different fingerprints, by what each of them said last."""
        for round_, reports in sorted(self.fingerprints.items()):
            if len(set(reports.values())) > 1:
                yield round_, reports

    def _take(self, record: bytes, digest: bytes) -> None:
        body = decode_record(CommitBody, record)
        assert body.round == self.head + 1
        assert not self.digests or body.parent == self.digests[-1]
        self.records.append(record)
        self.commits.append(body)
        self.digests.append(digest)
        self.indices.update({a.peer_id: a.index for a in body.admitted})
        for report in body.reports:
            self.fingerprints.setdefault(report.round, {})[report.peer] = report.fingerprint

    def _connect(self) -> sqlite3.Connection:
        """Without ever writing to it. A database that was closed cleanly has no write-ahead log."""
        is_live = self._path.with_name(f"{self._path.name}-wal").exists()
        mode = "mode=ro" if is_live else "mode=ro&immutable=1"
        return sqlite3.connect(f"file:{self._path}?{mode}", uri=True, timeout=10)
