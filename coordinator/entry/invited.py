"""Which peer came in by which invitation: from the ledger, and beside it for those that no record has yet."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping

_TABLE = "CREATE TABLE IF NOT EXISTS invited (idx INTEGER PRIMARY KEY, invitation TEXT NOT NULL)"


class Invited:
    """Of one ledger. Invitations have their names in it; writes are part of the caller's transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._by_peer: dict[int, str] = {}
        self._uses: Counter[str] = Counter()

    def recall(self, in_records: Mapping[int, str]) -> None:
        """`in_records`: what the ledger says of its peers, by index; of later ones the table tells."""
        self._by_peer = {index: invitation for index, invitation in in_records.items() if invitation}
        if self._is_there():
            later = (len(in_records),)
            self._by_peer.update(self._db.execute("SELECT * FROM invited WHERE idx >= ?", later))
        self._uses = Counter(self._by_peer.values())

    def stage(self, index: int, invitation: str) -> None:
        """Beside the admission of a peer, in the same transaction."""
        if invitation:
            self._db.execute(_TABLE)  # most runs have none
            self._db.execute("INSERT OR REPLACE INTO invited VALUES (?, ?)", (index, invitation))

    def note(self, index: int, invitation: str) -> None:
        """The transaction is done."""
        if invitation:
            self._by_peer[index] = invitation
            self._uses[invitation] += 1

    def drop(self, first: int) -> None:
        """Peers from this index on were not admitted after all."""
        if self._is_there():
            self._db.execute("DELETE FROM invited WHERE idx >= ?", (first,))

    def of(self, index: int) -> str:
        """ "": none."""
        return self._by_peer.get(index, "")

    def uses(self, invitation: str) -> int:
        """Identities that it has let in."""
        return self._uses[invitation]

    def all(self) -> dict[str, int]:
        """How many identities each has let in."""
        return dict(self._uses)

    def _is_there(self) -> bool:
        found = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'invited'").fetchone()
        return found is not None
