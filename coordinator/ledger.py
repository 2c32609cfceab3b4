"""The ledger: a signed hash chain in SQLite. A record is on the disk before anyone sees it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..compression.errors import ConfigError, LedgerCorrupt
from .checkpoints.file import Checkpoint, Walked, digest_of_peers
from .entry.admitted import SCHEMA, Admitted
from .entry.invited import Invited
from .protocol.chain import REPAIR_FORK, Chain, Forked, check_genesis, seats_of
from .protocol.files import disk_error, sync_folder
from .protocol.identity import peer_id_of
from .protocol.ledger_copy import records_with_committees, work_in
from .protocol.messages import (
    Admission,
    BadMessage,
    Commit,
    CommitBody,
    GenesisBody,
    SeatEntry,
    decode_record,
    digest_of,
    encode_record,
)
from .protocol.trust.seals import Committee, Sealed

_SCHEMA = f"""
CREATE TABLE record (
    round INTEGER PRIMARY KEY, record BLOB NOT NULL, signature BLOB NOT NULL, digest BLOB NOT NULL
);
{SCHEMA}
CREATE TABLE held_out (round INTEGER PRIMARY KEY, loss REAL NOT NULL);
"""

_EVALUATION = """
CREATE TABLE IF NOT EXISTS evaluation (round INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL)
"""

MAX_NOTED = 1000
"""Evaluations that are looked through for one that is known; `note_evaluation` knows all."""

_WORK = "CREATE TABLE IF NOT EXISTS work (digest BLOB PRIMARY KEY, signatures BLOB NOT NULL) WITHOUT ROWID"

_FOUNDED, _BEGUN = 0, 1
"""`user_version`: whose key was there when the ledger was made: the founder's, or any."""

_SEALED_BYTES = 2**20
"""Of the records that a seat gets at once, unless a single one is larger."""


class Ledger:
    """One run's records, and beside them what survives a restart but is not signed: admissions that no
    commit carries yet, held-out losses and evaluations. Not thread-safe: callers serialise, from any thread.
    """

    def __init__(self, db: sqlite3.Connection, path: Path, public_key: Ed25519PublicKey | None) -> None:
        """Use `create`, `begin` or `open`."""
        self._db = db
        self._path = path
        record, self.genesis_signature = self._genesis()
        self.genesis_record: bytes = record
        self.genesis: GenesisBody = decode_record(GenesisBody, record)
        self.run_id: bytes = digest_of(record)
        self._newest: Commit | None = None
        self._walked = Walked()
        self.checkpoint = None if public_key is None else self._read_checkpoint(public_key)
        """What was verified before, and is as it was then; None: all of it has been verified now."""
        self._chain, committed = self._verify()
        self._appends: tuple[Ed25519PrivateKey, str] | None = None
        """The key that appends, and its peer id: a public key takes as long as a signature to work out."""
        try:
            self._admitted = Admitted(db, committed)
        except LedgerCorrupt as e:
            raise LedgerCorrupt(f"{path}: {e}. {_REPAIR_FILE}") from e
        if public_key is not None and not self._is_of(public_key):
            raise self._corrupt(0, "record 0: its signature is not this coordinator's")

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

    @property
    def recovery(self) -> bytes:
        """Digest of the key that may name another committee; b"": there is none."""
        return self._chain.recovery

    @property
    def seats(self) -> tuple[SeatEntry, ...]:
        """Of the committee, with their addresses, once a record has named it."""
        return self._chain.seats

    @property
    def invited(self) -> Invited:
        """By which invitations peers came in."""
        return self._admitted.invited

    @classmethod
    def create(cls, path: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> Ledger:
        """A ledger with record 0, by the founder's key. Raises ConfigError if the file exists."""
        record = encode_record(genesis)
        _create(path, record, key.sign(record), _FOUNDED)
        return cls.open(path, key.public_key())

    @classmethod
    def begin(cls, path: Path, record: bytes, signature: bytes) -> Ledger:
        """A ledger of another seat than the founder, or of one that is going to be one: from record 0, as the
        founder has signed it. Raises ConfigError if the file exists, LedgerCorrupt if that is no record 0."""
        check_genesis(record, signature)
        _create(path, record, signature, _BEGUN)
        return cls._opened(path, None)

    @classmethod
    def open(cls, path: Path, public_key: Ed25519PublicKey) -> Ledger:
        """Verifies the whole chain, but for what a checkpoint of this key's vouches for. `public_key`: of the
        founder, or of a seat that a record names; where the ledger was begun from record 0 any.

        Raises ConfigError (no file), DiskError or LedgerCorrupt naming the bad record.
        """
        return cls._opened(path, public_key)

    @classmethod
    def _opened(cls, path: Path, public_key: Ed25519PublicKey | None) -> Ledger:
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
            told = disk_error(e, path) or LedgerCorrupt(f"{path} cannot be read: {e}. {_REPAIR_FILE}")
            raise told from e
        except BaseException:
            db.close()
            raise

    def append(self, body: CommitBody, key: Ed25519PrivateKey, work: bytes = b"") -> Commit:
        """Signs and stores the next commit; it is on the disk when this returns. `work`: the blob that it
        names, kept beside it. Raises ConfigError where this key alone does not order the run."""
        if body.round != self.head_round + 1 or body.parent != self.head_digest:
            raise ValueError(f"round {body.round} does not follow round {self.head_round}")
        if self._appends is None or self._appends[0] is not key:
            self._appends = key, peer_id_of(key.public_key())
        me = self._appends[1]
        if not self.committee.is_only(me):
            raise ConfigError(_others_order(self.committee, me))
        record = encode_record(body)
        commit = Commit.made(body, record, key.sign(record))
        with self._db:
            self._insert(commit, body, work)
        self._walked.add([(commit.record, commit.signature, commit.digest)])
        self._chain.took(commit)
        self._newest = commit
        self._admitted.committed(body.admitted)
        return commit

    def take(self, *sealed: Sealed) -> list[Commit]:
        """The next commits, as the run's committee has sealed them, whoever of it proposed them; they are on
        the disk when this returns. Without `work` where the seat that they come from has lost it.

        Raises LedgerCorrupt (Forked, if that is it), and stays as it was, for what are not the next commits.
        """
        return self._follow(sealed, Chain.check)

    def adopt(self, commits: Sequence[Commit]) -> None:
        """Takes back the next commits, which a node has and this coordinator has lost; all of them, or none.

        Raises BadMessage (not of this run's coordinators, not the next ones) or LedgerCorrupt (another chain:
        a fork).
        """
        self._follow([Sealed(record=c.record, seal=c.signature) for c in commits], _check_given_back)

    def _follow(self, sealed: Sequence[Sealed], check: Callable[[Chain, Commit], None]) -> list[Commit]:
        """All of them, or none. Pending admissions that contradict them are forgotten."""
        chain, commits = copy(self._chain), [entry.commit for entry in sealed]
        with self._db:
            for entry, commit in zip(sealed, commits, strict=True):
                check(chain, commit)
                _check_work(commit.body, entry.work)
                self._insert(commit, commit.body, entry.work)
            committed = self._admitted.write(commit.body for commit in commits)
        self._chain = chain
        self._walked.add((commit.record, commit.signature, commit.digest) for commit in commits)
        self._newest = commits[-1]
        self._admitted.wrote(committed)
        return commits

    def commits(self, after: int, limit: int) -> list[Commit]:
        """At most `limit` commits from round `after` + 1 on; the newest, which many ask for, from memory."""
        if after == self.head_round - 1 and self._newest is not None:
            return [self._newest]
        rows = self._db.execute(
            "SELECT record, signature FROM record WHERE round > ? ORDER BY round LIMIT ?",
            (max(after, 0), limit),
        )
        return [Commit(record=record, signature=signature) for record, signature in rows]

    def all_commits(self, after: int = 0) -> Iterator[Commit]:
        """Every commit after that round in order, without holding them all."""
        while batch := self.commits(after, 256):
            yield from batch
            after += len(batch)

    def sealed(self, after: int, limit: int) -> list[Sealed]:
        """At most `limit` commits from round `after` + 1 on for a seat that is behind, with the signatures
        that they name, as far as they are here; fewer than `limit`, if they are large."""
        found: list[Sealed] = []
        n_bytes = 0
        for commit in self.commits(after, limit):
            work = self.work(commit.body.work) if commit.body.work else None
            found.append(Sealed(record=commit.record, seal=commit.signature, work=work or b""))
            n_bytes += len(commit.record) + len(work or b"")
            if n_bytes > _SEALED_BYTES:
                break
        return found if n_bytes <= _SEALED_BYTES or len(found) == 1 else found[:-1]

    def committees(self, up_to: int) -> list[CommitBody]:
        """The records that name a committee, in order, to that round."""
        return records_with_committees(self._db, up_to)

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
        return self._admitted.admit(peer_id, invitation)

    def pending_admissions(self) -> tuple[Admission, ...]:
        """Admissions that no commit carries yet: they go into the next one."""
        return self._admitted.pending()

    def index_of(self, peer_id: str) -> int | None:
        """None: the peer was never admitted."""
        return self._admitted.index_of(peer_id)

    def peers(self) -> dict[int, str]:
        """All that were ever admitted, in order: index -> peer id."""
        return self._admitted.peers()

    def peer_id(self, index: int) -> str:
        """Raises KeyError for an index that nobody has."""
        return self._admitted.peer_id(index)

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

    def note_measured(
        self, held_out: Iterable[tuple[int, float]], evaluations: Iterable[tuple[int, Mapping[str, float]]]
    ) -> dict[int, float]:
        """What another coordinator has noted, at once; the first of a round stands. Returns the held-out
        losses that are new."""
        losses = dict(held_out)
        new = {round_: losses[round_] for round_ in losses.keys() - dict(self.held_out())}
        if new:
            with self._db:
                self._db.executemany("INSERT OR IGNORE INTO held_out VALUES (?, ?)", sorted(new.items()))
        found = dict(evaluations)
        for round_ in found.keys() - dict(self.evaluations(MAX_NOTED) if found else ()):
            self.note_evaluation(round_, found[round_])
        return new

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

    def _genesis(self) -> tuple[bytes, bytes]:
        row = self._db.execute("SELECT record, signature, digest FROM record WHERE round = 0").fetchone()
        if row is None:
            raise LedgerCorrupt(f"{self._path}: record 0 is missing. {_REPAIR_FILE}")
        record, signature, digest = row
        try:
            check_genesis(record, signature)
        except LedgerCorrupt as e:
            raise self._corrupt(0, str(e)) from e
        if digest != digest_of(record):
            raise self._corrupt(0, "record 0: its digest does not fit its bytes")
        return bytes(record), bytes(signature)

    def _is_of(self, public_key: Ed25519PublicKey) -> bool:
        """Whether who has this key keeps this ledger: a folder with another key is a mistake."""
        if self._db.execute("PRAGMA user_version").fetchone() == (_BEGUN,):
            return True
        named = {seat.peer_id for body in self.committees(self.head_round) for seat in seats_of(body)}
        return peer_id_of(public_key) in {self.genesis.coordinator} | named

    def _insert(self, commit: Commit, body: CommitBody, work: bytes) -> None:
        self._db.execute(
            "INSERT INTO record VALUES (?, ?, ?, ?)",
            (body.round, commit.record, commit.signature, commit.digest),
        )
        if work:
            self._db.execute(_WORK)
            self._db.execute("INSERT OR IGNORE INTO work VALUES (?, ?)", (body.work, work))

    def _verify(self) -> tuple[Chain, dict[int, str]]:
        """Walks the chain, from the checkpoint on. Returns the invitations of admitted peers, too."""
        founder, recovery, known = self.genesis.coordinator, self.genesis.recovery, self.checkpoint
        chain, committed = Chain(self.run_id, founder, recovery=recovery), dict[int, str]()
        if known is not None:
            before = self.committees(known.round)
            chain = Chain(self.run_id, founder, known.round, known.digest, recovery=recovery, before=before)
            committed = dict(enumerate(known.invitations))
        rows = self._db.execute(
            "SELECT round, record, signature, digest FROM record WHERE round != 0 AND "
            "(round < 0 OR round > ?) ORDER BY round",
            (chain.round,),
        )
        for round_, record, signature, digest in rows:
            wanted = chain.round + 1
            if round_ != wanted:
                raise self._corrupt(wanted, f"record {wanted} is missing, record {round_} is there")
            if not isinstance(record, bytes) or digest != digest_of(record):
                raise self._corrupt(wanted, f"record {wanted}: its digest does not fit its bytes")
            try:
                commit = Commit(record=record, signature=signature)
                chain.check(commit)
            except LedgerCorrupt as e:
                raise self._corrupt(wanted, str(e)) from e
            except ValueError as e:
                raise self._corrupt(wanted, f"record {wanted}: its signature is none") from e
            for admission in commit.body.admitted:
                self._check_admission(wanted, admission)
                committed[admission.index] = admission.invitation
            self._walked.add([(record, signature, digest)])
            self._newest = commit
        return chain, committed

    def _read_checkpoint(self, key: Ed25519PublicKey) -> Checkpoint | None:
        """None: there is none, or the ledger is not what it was then."""
        found = Checkpoint.read(self._checkpoint_path, self.run_id, key)
        if found is None:
            return None
        rows = self._db.execute(
            "SELECT record, signature, digest FROM record WHERE round BETWEEN 1 AND ? ORDER BY round",
            (found.round,),
        )
        walked = Walked()
        with suppress(TypeError):  # other types in the file: it is not what it was
            walked.add(rows)
        n = len(found.invitations)
        peers = dict(self._db.execute("SELECT idx, peer_id FROM admission WHERE idx < ?", (n,)))
        is_same = (walked.round, walked.digest) == (found.round, found.records)
        if not is_same or digest_of_peers(peers, n) != found.peers:
            return None
        self._walked = walked
        return found

    def save_checkpoint(self, derived: bytes, key: Ed25519PrivateKey) -> Callable[[], None]:
        """What writes a checkpoint of the ledger as it is now, in any thread; that raises OSError. `key`: the
        one that opens the ledger again; `derived`: see `Checkpoint`."""
        committed = self._admitted.in_records()
        checkpoint = Checkpoint(
            run_id=self.run_id,
            round=self.head_round,
            digest=self.head_digest,
            records=self._walked.digest,
            invitations=tuple(committed[index] for index in range(len(committed))),
            peers=digest_of_peers(self._admitted.peers(), len(committed)),
            derived=derived,
        )
        return partial(checkpoint.write, self._checkpoint_path, key)

    @property
    def _checkpoint_path(self) -> Path:
        return self._path.with_suffix(".checkpoint")

    def _check_admission(self, round_: int, admission: Admission) -> None:
        """Admissions are derived from the records; the table only adds what no commit carries yet."""
        if not Admitted.agrees(self._db, admission):
            text = f"record {round_}: it admits {admission.peer_id} as peer {admission.index}"
            raise self._corrupt(round_, f"{text}, the table of admissions says otherwise")

    def _corrupt(self, round_: int, what: str) -> LedgerCorrupt:
        repair = _REPAIR_FILE
        if round_ > 0:
            repair += (
                f" Or go back to round {round_ - 1}, and let the nodes join anew:"
                f' sqlite3 {self._path} "DELETE FROM record WHERE round >= {round_}"'
            )
        return LedgerCorrupt(f"{self._path}: {what}. {repair}")


_REPAIR_FILE = "Restore the state directory from a copy."


def _create(path: Path, record: bytes, signature: bytes, version: int) -> None:
    """A file with record 0, whole or not at all. Raises ConfigError if it exists, or DiskError."""
    if path.exists():
        raise ConfigError(f"{path} holds a run already: open it, or choose another state directory")
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    db = sqlite3.connect(aside)
    try:
        db.execute("PRAGMA synchronous = FULL")
        with db:
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {version}")
            db.execute("INSERT INTO record VALUES (0, ?, ?, ?)", (record, signature, digest_of(record)))
    except sqlite3.Error as e:
        raise disk_error(e, path) or e from e
    finally:
        db.close()
    aside.rename(path)
    sync_folder(path.parent)


def _check_work(body: CommitBody, work: bytes) -> None:
    """Seats checked the signatures themselves before they voted; it is enough that these are the same."""
    if work and digest_of(work) != body.work:
        raise LedgerCorrupt(f"record {body.round}: the signatures beside it are not those that it names")


def _check_given_back(chain: Chain, commit: Commit) -> None:
    try:
        chain.check(commit)
    except Forked:
        n = chain.round
        raise LedgerCorrupt(
            f"round {n + 1} of the node follows another round {n} than the coordinator has. {REPAIR_FORK}"
        ) from None
    except LedgerCorrupt as e:
        raise BadMessage(f"a commit was given back, but {e}") from e


def _others_order(committee: Committee, me: str) -> str:
    if me in committee.seats:
        return f"a committee of {len(committee.seats)} coordinators orders this run, not this one alone"
    return "other coordinators order this run: this one has no seat in their committee any more"
