"""Who was admitted to a run, by which index: records say so, and a table of those that no record has yet."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from itertools import takewhile

from ...compression.errors import Incompatible, LedgerCorrupt
from ..protocol.messages import MAX_PEERS, Admission, CommitBody
from .invited import Invited

MAX_INDEX = 2**16 - 1

SCHEMA = "CREATE TABLE admission (idx INTEGER PRIMARY KEY, peer_id TEXT NOT NULL UNIQUE);"


class Admitted:
    """Of one ledger, whose records are in `db`, too."""

    def __init__(self, db: sqlite3.Connection, committed: Mapping[int, str]) -> None:
        """`committed`: of all that the records admit, the invitation ("": none) by index; the table `agrees`.
        Raises LedgerCorrupt: it has gaps."""
        self._db = db
        self._committed = dict(committed)
        self.invited = Invited(db)
        self._peer_ids: dict[int, str] = {}
        self._indices: dict[str, int] = {}
        self._read()

    @staticmethod
    def agrees(db: sqlite3.Connection, admission: Admission) -> bool:
        """Whether the table has this admission, which a record has."""
        found = db.execute("SELECT peer_id FROM admission WHERE idx = ?", (admission.index,)).fetchone()
        return bool(found == (admission.peer_id,))

    def admit(self, peer_id: str, invitation: str) -> int:
        """See `Ledger.admit`."""
        known = self._indices.get(peer_id)
        if known is not None:
            return known
        index = len(self._peer_ids)
        if index > MAX_INDEX or index - len(self._committed) >= MAX_PEERS:
            raise Incompatible("the swarm is full: too many peers have been admitted")
        with self._db:
            self._db.execute("INSERT INTO admission VALUES (?, ?)", (index, peer_id))
            self.invited.stage(index, invitation)
        self.invited.note(index, invitation)
        self._peer_ids[index], self._indices[peer_id] = peer_id, index
        return index

    def pending(self) -> tuple[Admission, ...]:
        """Those that no record has yet."""
        return tuple(
            Admission(index=index, peer_id=self._peer_ids[index], invitation=self.invited.of(index))
            for index in range(len(self._committed), len(self._peer_ids))
        )

    def index_of(self, peer_id: str) -> int | None:
        """None: the peer was never admitted."""
        return self._indices.get(peer_id)

    def peers(self) -> dict[int, str]:
        """All of them, in order: index -> peer id."""
        return dict(self._peer_ids)

    def peer_id(self, index: int) -> str:
        """Raises KeyError for an index that nobody has."""
        return self._peer_ids[index]

    def in_records(self) -> dict[int, str]:
        """Of those that records admit: the invitation ("": none) by index."""
        return dict(self._committed)

    def committed(self, admissions: Iterable[Admission]) -> None:
        """A record has these, which were pending."""
        self._committed.update((admission.index, admission.invitation) for admission in admissions)

    def write(self, bodies: Iterable[CommitBody]) -> dict[int, str]:
        """Of records that another seat may have made, within the caller's transaction; once that is done,
        `wrote` takes what this returns. Pending admissions that say otherwise did not happen: they are
        dropped, and those after them. Raises LedgerCorrupt for what does not fit the records before."""
        admitted = [(body.round, admission) for body in bodies for admission in body.admitted]
        committed = dict(self._committed)
        n_same = sum(1 for _ in takewhile(_is_same, zip(self.pending(), admitted, strict=False)))
        if n_same < len(admitted):
            first = len(committed) + n_same
            self._db.execute("DELETE FROM admission WHERE idx >= ?", (first,))
            self.invited.drop(first)
        for i, (round_, admission) in enumerate(admitted):
            if i >= n_same:
                self._write(round_, admission, len(committed))
            committed[admission.index] = admission.invitation
        return committed

    def wrote(self, committed: dict[int, str]) -> None:
        """What `write` wrote is on the disk."""
        if len(committed) > len(self._committed):
            self._committed = committed
            self._read()

    def _write(self, round_: int, admission: Admission, index: int) -> None:
        try:
            if admission.index != index:
                raise ValueError(f"peer {index} would be the next")
            self._db.execute("INSERT INTO admission VALUES (?, ?)", (index, admission.peer_id))
        except (ValueError, sqlite3.IntegrityError) as e:
            text = f"record {round_}: it admits {admission.peer_id} as peer {admission.index}"
            raise LedgerCorrupt(f"{text}, which does not fit the records before it: {e}") from e

    def _read(self) -> None:
        found = dict(self._db.execute("SELECT idx, peer_id FROM admission ORDER BY idx"))
        if list(found) != list(range(len(found))):
            raise LedgerCorrupt("admissions are missing")
        self._peer_ids = found
        self._indices = {peer_id: index for index, peer_id in found.items()}
        self.invited.recall(self._committed)


def _is_same(pair: tuple[Admission, tuple[int, Admission]]) -> bool:
    ours, (_, theirs) = pair
    return ours == theirs
