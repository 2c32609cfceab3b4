"""The ledger as an onlooker reads it: from the databases of the coordinators, while they run or after they
died.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from thinwire.coordinator.protocol.messages import BadMessage, CommitBody, decode_record
from thinwire.coordinator.protocol.trust.seals import Committee, Seal


class Book:
    """All commits so far, in order: `commits[r - 1]` is round r's, and beside it `records` and `digests`.

    `read` takes in what is new, from whichever coordinator has it. The ledger of a single one that was put
    back to an older copy is read from its start again; of several, one that has another record than the
    others is a fork, and is told in `forks`. `sealer`: peer id of the seat that had the newest record sealed;
    None: a single coordinator's, or the recovery key's.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = list(paths)
        self.forks: set[tuple[int, str]] = set()
        """(round, path of the ledger that has another record there)."""
        self._forget()

    def _forget(self) -> None:
        self.sealer: str | None = None
        self.committee: Committee | None = None
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
        for path in self.paths:
            if path.exists():
                self._read(path)
        return self.head

    def _read(self, path: Path) -> None:
        with closing(_connect(path)) as db:
            head = db.execute("SELECT digest FROM record WHERE round = ?", (self.head,)).fetchone()
            if self.head and (head is None or head[0] != self.digests[-1]):
                if head is not None and len(self.paths) > 1:
                    self.forks.add((self.head, str(path)))
                if len(self.paths) > 1:
                    return  # it is behind
                self._forget()
            rows = db.execute(
                "SELECT record, signature, digest FROM record WHERE round > ? ORDER BY round", (self.head,)
            ).fetchall()
        for record, seal, digest in rows:
            self._take(record, seal, digest)

    def compare(self) -> list[int]:
        """Reads every ledger from its start to its end; returns their heads. What differs is in `forks`."""
        heads = []
        for path in self.paths:
            with closing(_connect(path)) as db:
                rows = db.execute("SELECT digest FROM record WHERE round > 0 ORDER BY round").fetchall()
            pairs = enumerate(zip(rows, self.digests, strict=False), 1)
            self.forks |= {(round_, str(path)) for round_, ((theirs,), ours) in pairs if theirs != ours}
            heads.append(len(rows))
        return heads

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

    def _take(self, record: bytes, seal: bytes, digest: bytes) -> None:
        body = decode_record(CommitBody, record)
        assert body.round == self.head + 1
        assert not self.digests or body.parent == self.digests[-1]
        self.records.append(record)
        self.commits.append(body)
        self.digests.append(digest)
        self.sealer = self._owner(seal)
        if body.committee is not None:
            self.committee = Committee.named(body.round, body.committee)
        self.indices.update({a.peer_id: a.index for a in body.admitted})
        for report in body.reports:
            self.fingerprints.setdefault(report.round, {})[report.peer] = report.fingerprint

    def _owner(self, seal: bytes) -> str | None:
        if self.committee is None:
            return None
        if len(self.committee.seats) == 1:
            return self.committee.seats[0]
        try:
            return self.committee.owner(Seal.parse(seal).ballot)
        except BadMessage:  # the recovery key's
            return None


def _connect(path: Path) -> sqlite3.Connection:
    """Without ever writing to it. A database that was closed cleanly has no write-ahead log."""
    is_live = path.with_name(f"{path.name}-wal").exists()
    mode = "mode=ro" if is_live else "mode=ro&immutable=1"
    return sqlite3.connect(f"file:{path}?{mode}", uri=True, timeout=10)
