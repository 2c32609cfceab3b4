"""The ledger: a signed hash chain in SQLite. A record is on the disk before anyone sees it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..compression.errors import ConfigError, Incompatible, LedgerCorrupt
from .entry.invited import Invited
from .protocol.chain import REPAIR_FORK, Chain, Forked
from .protocol.files import sync_folder
from .protocol.ledger_copy import work_in
from .protocol.messages import (
    MAX_PEERS,
    Admission,
    BadMessage,
    Commit,
    CommitBody,
    GenesisBody,
    decode_record,
    digest_of,
    encode_record,
)
from .protocol.trust.seals import Committee

MAX_INDEX = 2**16 - 1

_SCHEMA = """
CREATE TABLE record (
    round INTEGER PRIMARY KEY, record BLOB NOT NULL, signature BLOB NOT NULL, digest BLOB NOT NULL
);
CREATE TABLE admission (idx INTEGER PRIMARY KEY, peer_id TEXT NOT NULL UNIQUE);
CREATE TABLE held_out (round INTEGER PRIMARY KEY, loss REAL NOT NULL);
"""

_EVALUATION = """
CREATE TABLE IF NOT EXISTS evaluation (round INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL)
"""


_WORK = "CREATE TABLE IF NOT EXISTS work (digest BLOB PRIMARY KEY, signatures BLOB NOT NULL) WITHOUT ROWID"


class Ledger:
    """One run's records, and beside them what survives a restart but is not signed: admissions that no
    commit carries yet, held-out losses and evaluations. Not thread-safe: callers serialise, from any thread.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, public_key: Ed25519PublicKey) -> None:
        """Use `create` or `open`."""
        self._db = db
        self._path = path
        record, self.genesis_signature = self._genesis(public_key)
        self.genesis_record: bytes = record
        self.genesis: GenesisBody = decode_record(GenesisBody, record)
        self.run_id: bytes = digest_of(record)
        self._committed: dict[int, str] = {}
        self._chain = self._verify()
        self._peer_ids = self._admissions()
        self.invited = Invited(db)
        self.invited.recall(self._committed)
        self._indices = {peer_id: index for index, peer_id in self._peer_ids.items()}

    @property
    def head_round(self) -> int:
        """The newest round; 0: there is no commit yet."""
        return self._chain.round

    @property
    def head_digest(self) -> bytes:
        """Of the newest record; the run id without any commit."""
        return self._chain.digest or self.run_id

    @property
    def committee(self) -> Committee:
        """That seals the next record."""
        return self._chain.committee

    @classmethod
    def create(cls, path: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> Ledger:
        """A ledger with record 0. Raises ConfigError if the file exists."""
        if path.exists():
            raise ConfigError(f"{path} holds a run already: open it, or choose another state directory")
        aside = path.with_name(f".{path.name}.part")
        aside.unlink(missing_ok=True)
        record = encode_record(genesis)
        db = sqlite3.connect(aside)
        db.execute("PRAGMA synchronous = FULL")
        with db:
            db.executescript(_SCHEMA)
            db.execute(
                "INSERT INTO record VALUES (0, ?, ?, ?)", (record, key.sign(record), digest_of(record))
            )
        db.close()
        aside.rename(path)
        sync_folder(path.parent)
        return cls.open(path, key.public_key())

    @classmethod
    def open(cls, path: Path, public_key: Ed25519PublicKey) -> Ledger:
        """Verifies the whole chain. Raises ConfigError (no file) or LedgerCorrupt naming the bad record."""
        if not path.exists():
            raise ConfigError(f"{path}: there is no ledger")
        # Serialised by the callers: a link in threads uses one connection under its lock.
        db = sqlite3.connect(path, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise LedgerCorrupt(f"{path} is damaged: {found}. {_REPAIR_FILE}")
            return cls(db, path, public_key)
        except sqlite3.DatabaseError as e:
            db.close()
            raise LedgerCorrupt(f"{path} cannot be read: {e}. {_REPAIR_FILE}") from e
        except BaseException:
            db.close()
            raise

    def append(self, body: CommitBody, key: Ed25519PrivateKey, work: bytes = b"") -> Commit:
        """Signs and stores the next commit; it is on the disk when this returns. `work`: the blob that it
        names, kept beside it."""
        if body.round != self.head_round + 1 or body.parent != self.head_digest:
            raise ValueError(f"round {body.round} does not follow round {self.head_round}")
        record = encode_record(body)
        commit = Commit(record=record, signature=key.sign(record))
        with self._db:
            self._db.execute(
                "INSERT INTO record VALUES (?, ?, ?, ?)",
                (body.round, record, commit.signature, commit.digest),
            )
            if work:
                self._db.execute(_WORK)
                self._db.execute("INSERT OR IGNORE INTO work VALUES (?, ?)", (body.work, work))
        self._chain.took(commit)
        self._committed.update((admission.index, admission.invitation) for admission in body.admitted)
        return commit

    def adopt(self, commits: Sequence[Commit]) -> None:
        """Takes back the next commits, which this coordinator signed and has lost; all of them, or none.

        Admissions that no commit carries are forgotten: they may contradict those that did happen. Raises
        BadMessage (not of this coordinator, not the next ones) or LedgerCorrupt (another chain: a fork).
        """
        chain = copy(self._chain)
        n_admitted = len(self._committed)
        with self._db:
            self._db.execute("DELETE FROM admission WHERE idx >= ?", (n_admitted,))
            self.invited.drop(n_admitted)
            admitted = dict(self._committed)
            for commit in commits:
                self._check_next(chain, commit)
                self._db.execute(
                    "INSERT INTO record VALUES (?, ?, ?, ?)",
                    (chain.round, commit.record, commit.signature, commit.digest),
                )
                for admission in commit.body.admitted:
                    self._readmit(admission, n_admitted, chain.round)
                    n_admitted += 1
                    admitted[admission.index] = admission.invitation
        self._chain = chain
        self._committed = admitted
        self.invited.recall(admitted)
        self._peer_ids = self._admissions()
        self._indices = {peer_id: index for index, peer_id in self._peer_ids.items()}

    def _check_next(self, chain: Chain, commit: Commit) -> None:
        try:
            chain.check(commit)
        except Forked:
            n = chain.round
            raise LedgerCorrupt(
                f"round {n + 1} of the node follows another round {n} than the coordinator has. {REPAIR_FORK}"
            ) from None
        except LedgerCorrupt as e:
            raise BadMessage(f"a commit was given back, but {e}") from e

    def _readmit(self, admission: Admission, index: int, round_: int) -> None:
        try:
            if admission.index != index:
                raise ValueError(f"peer {index} would be the next")
            self._db.execute("INSERT INTO admission VALUES (?, ?)", (index, admission.peer_id))
        except (ValueError, sqlite3.IntegrityError) as e:
            text = f"record {round_}: it admits {admission.peer_id} as peer {admission.index}"
            raise LedgerCorrupt(f"{text}, which does not fit the records before it: {e}") from e

    def commits(self, after: int, limit: int) -> list[Commit]:
        """At most `limit` commits from round `after` + 1 on."""
        rows = self._db.execute(
            "SELECT record, signature FROM record WHERE round > ? ORDER BY round LIMIT ?",
            (max(after, 0), limit),
        )
        return [Commit(record=record, signature=signature) for record, signature in rows]

    def all_commits(self) -> Iterator[Commit]:
        """Every commit in order, without holding them all."""
        after = 0
        while batch := self.commits(after, 256):
            yield from batch
            after += len(batch)

    def work(self, digest: bytes) -> bytes | None:
        """The signatures of a commit's offers, by the digest in the commit; None: they are not here."""
        return work_in(self._db, digest)

    def digest_at(self, round_: int) -> bytes | None:
        """Digest of the record of this round; None: there is none."""
        row = self._db.execute("SELECT digest FROM record WHERE round = ?", (round_,)).fetchone()
        return None if row is None else bytes(row[0])

    def admit(self, peer_id: str, invitation: str = "") -> int:
        """The peer's index, the same for ever; a new one is on the disk when this returns. `invitation`: the
        name of the one that lets it in.

        Raises Incompatible when no more can be admitted before the next commit, or at all.
        """
        known = self._indices.get(peer_id)
        if known is not None:
            return known
        index = len(self._peer_ids)
        if index > MAX_INDEX or len(self.pending_admissions()) >= MAX_PEERS:
            raise Incompatible("the swarm is full: too many peers have been admitted")
        with self._db:
            self._db.execute("INSERT INTO admission VALUES (?, ?)", (index, peer_id))
            self.invited.stage(index, invitation)
        self.invited.note(index, invitation)
        self._peer_ids[index], self._indices[peer_id] = peer_id, index
        return index

    def pending_admissions(self) -> tuple[Admission, ...]:
        """Admissions that no commit carries yet: they go into the next one."""
        return tuple(
            Admission(index=index, peer_id=peer_id, invitation=self.invited.of(index))
            for index, peer_id in sorted(self._peer_ids.items())
            if index not in self._committed
        )

    def index_of(self, peer_id: str) -> int | None:
        """None: the peer was never admitted."""
        return self._indices.get(peer_id)

    def peers(self) -> dict[int, str]:
        """All that were ever admitted, in order: index -> peer id."""
        return dict(self._peer_ids)

    def peer_id(self, index: int) -> str:
        """Raises KeyError for an index that nobody has."""
        return self._peer_ids[index]

    def note_held_out(self, round_: int, loss: float) -> bool:
        """Keeps the first held-out loss of a round, in nats; False: there was one."""
        with self._db:
            done = self._db.execute("INSERT OR IGNORE INTO held_out VALUES (?, ?)", (round_, loss))
        return done.rowcount > 0

    def held_out(self, most: int | None = None) -> list[tuple[int, float]]:
        """(round, loss) in order; of more than `most` so many, evenly spread, with the first and the last."""
        found = list(self._db.execute("SELECT round, loss FROM held_out ORDER BY round"))
        if most is None or len(found) <= most:
            return found
        return [found[i * (len(found) - 1) // (most - 1)] for i in range(most)]

    def note_evaluation(self, round_: int, figures: Mapping[str, float]) -> bool:
        """Keeps the first evaluation of a round; False: there was one."""
        with self._db:
            self._db.execute(_EVALUATION)  # most runs have none
            known = self._db.execute("SELECT 1 FROM evaluation WHERE round = ? LIMIT 1", (round_,)).fetchone()
            if known is None:
                rows = [(round_, name, value) for name, value in figures.items()]
                self._db.executemany("INSERT INTO evaluation VALUES (?, ?, ?)", rows)
        return known is None

    def evaluations(self, last: int) -> list[tuple[int, dict[str, float]]]:
        """(round, figures by name) of at most the last so many, in order."""
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'evaluation'").fetchone():
            return []
        found: dict[int, dict[str, float]] = {}
        rounds = "SELECT DISTINCT round FROM evaluation ORDER BY round DESC LIMIT ?"
        for round_, name, value in self._db.execute(
            f"SELECT round, name, value FROM evaluation WHERE round IN ({rounds}) ORDER BY round, rowid",
            (last,),
        ):
            found.setdefault(round_, {})[name] = value
        return list(found.items())

    @property
    def n_bytes(self) -> int:
        """Of the database on the disk."""
        (n_pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (page_bytes,) = self._db.execute("PRAGMA page_size").fetchone()
        return int(n_pages * page_bytes)

    def close(self) -> None:
        """The database cannot be used any more."""
        self._db.close()

    def _genesis(self, public_key: Ed25519PublicKey) -> tuple[bytes, bytes]:
        row = self._db.execute("SELECT record, signature, digest FROM record WHERE round = 0").fetchone()
        if row is None:
            raise LedgerCorrupt(f"{self._path}: record 0 is missing. {_REPAIR_FILE}")
        record, signature, digest = row
        try:
            public_key.verify(signature, record)
            decode_record(GenesisBody, record)
        except InvalidSignature:
            raise self._corrupt(0, "record 0: its signature is not this coordinator's") from None
        except BadMessage as e:
            raise self._corrupt(0, f"record 0: it is no genesis: {e}") from e
        if digest != digest_of(record):
            raise self._corrupt(0, "record 0: its digest does not fit its bytes")
        return bytes(record), bytes(signature)

    def _verify(self) -> Chain:
        """Walks the chain."""
        chain = Chain(self.run_id, self.genesis.coordinator, recovery=self.genesis.recovery)
        rows = self._db.execute(
            "SELECT round, record, signature, digest FROM record WHERE round != 0 ORDER BY round"
        )
        for round_, record, signature, digest in rows:
            wanted = chain.round + 1
            if round_ != wanted:
                raise self._corrupt(wanted, f"record {wanted} is missing, record {round_} is there")
            if digest != digest_of(record):
                raise self._corrupt(wanted, f"record {wanted}: its digest does not fit its bytes")
            try:
                commit = Commit(record=record, signature=signature)
                chain.check(commit)
            except (LedgerCorrupt, ValueError) as e:
                raise self._corrupt(wanted, str(e)) from e
            self._admitted(commit.body)
        return chain

    def _admitted(self, body: CommitBody) -> None:
        """Admissions are derived from the records; the table only adds what no commit carries yet."""
        for admission in body.admitted:
            known = self._db.execute(
                "SELECT peer_id FROM admission WHERE idx = ?", (admission.index,)
            ).fetchone()
            if known != (admission.peer_id,):
                text = f"record {body.round}: it admits {admission.peer_id} as peer {admission.index}"
                raise self._corrupt(body.round, f"{text}, the table of admissions says otherwise")
            self._committed[admission.index] = admission.invitation

    def _admissions(self) -> dict[int, str]:
        found = dict(self._db.execute("SELECT idx, peer_id FROM admission ORDER BY idx"))
        if list(found) != list(range(len(found))):
            raise LedgerCorrupt(f"{self._path}: admissions are missing. {_REPAIR_FILE}")
        return found

    def _corrupt(self, round_: int, what: str) -> LedgerCorrupt:
        repair = _REPAIR_FILE
        if round_ > 0:
            repair += (
                f" Or go back to round {round_ - 1}, and let the nodes join anew:"
                f' sqlite3 {self._path} "DELETE FROM record WHERE round >= {round_}"'
            )
        return LedgerCorrupt(f"{self._path}: {what}. {repair}")


_REPAIR_FILE = "Restore the state directory from a copy."
