"""A node's copy of the ledger: record 0 and every commit that it has seen, in SQLite.

Nobody waits for it to be on the disk: what a crash takes is a tail, and the coordinator has that again. What
is in it makes a restart cheap, and gives a coordinator that was restored from an older copy its commits back.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

from ...compression.errors import ConfigError, LedgerCorrupt
from .chain import Chain
from .files import disk_error
from .messages import BadMessage, Commit, CommitBody, GenesisBody, SeatEntry, decode_record, digest_of
from .settings import RUN_KEYS, Course

log = logging.getLogger("thinwire.link")

COPY_NAME = "ledger.db"

_SCHEMA = """
CREATE TABLE run (run_id BLOB NOT NULL);
CREATE TABLE record (round INTEGER PRIMARY KEY, record BLOB NOT NULL, signature BLOB NOT NULL);
"""
_SELECT = "SELECT round, record, signature FROM record WHERE round > ? ORDER BY round LIMIT ?"
_INSERT = "INSERT OR REPLACE INTO record VALUES (?, ?, ?)"
_ALL = -1
_RECENT_BYTES = 2**20
_RECENT = 128
"""Of commits that are kept in memory: decoded they take many times the bytes of their records."""

_SECTIONS = tuple(sorted({key.partition(".")[0].encode() + b"." for key in (*RUN_KEYS, "strategy.")}))


class LedgerCopy:
    """Commits of one run without a gap. `path` None: in memory.

    Any thread may read; one thread appends. While the disk is full, commits are kept in memory.
    """

    def __init__(self, path: Path | None, run_id: bytes, founder: str) -> None:
        """`founder`: the coordinator of record 0, as far as is known; record 0 says it, once it is here.
        Verifies the whole chain; what does not fit is cut off, with a warning that names the record.

        Raises ConfigError: a file that cannot be used, of another run or of none; DiskError.
        """
        self._path, self._run_id = path, run_id
        self._genesis: tuple[bytes, bytes] | None = None
        self._chain = Chain(run_id, founder)
        self._lock = threading.RLock()
        self._recent: list[Commit] = []
        """The newest ones, decoded: who reads on as they come need not do it again."""
        self._recent_bytes = 0
        self._unwritten: list[Commit] = []
        self._is_closed = False
        self.peers: dict[int, str] = {}
        """Peer ids by the index that a commit has given them."""
        try:
            self._db = _open(path, run_id)
            self._load()
        except (sqlite3.Error, OSError) as e:
            bad = ConfigError(f"{path} cannot be used as a copy of the ledger ({e}): move it away")
            raise disk_error(e, path) or bad from e

    @property
    def head_round(self) -> int:
        """The newest round; 0: there is no commit yet."""
        return self._chain.round

    @property
    def head_digest(self) -> bytes:
        """Digest of the newest record; that of record 0, the run id, without any commit."""
        return self._chain.digest or self._run_id

    @property
    def seats(self) -> tuple[SeatEntry, ...]:
        """Of the committee that orders the run, once a record has named one."""
        return self._chain.seats

    def keep_genesis(self, record: bytes, signature: bytes) -> None:
        """Record 0, which the caller has verified: with it the copy can be read without a coordinator."""
        with self._lock:
            if self._genesis is None and self._chain.round == 0:
                self._begin(record, signature)
            try:
                with self._db:
                    self._db.execute("INSERT OR IGNORE INTO record VALUES (0, ?, ?)", (record, signature))
            except sqlite3.Error as e:  # a full disk: the next start tries again
                log.warning("%s does not take record 0: %s", self._path, e)

    def is_over(self, head: int) -> bool:
        """Whether the run is over once `head` is committed, as far as this copy tells."""
        with self._lock:
            if self._is_closed:
                return False
            try:
                row = self._db.execute("SELECT record FROM record WHERE round = 0").fetchone()
                if row is None:
                    return False
                course = Course.of(decode_record(GenesisBody, row[0]).config)
                course = course.after_all(records_with_changes(self._db))
            except (sqlite3.Error, BadMessage, ConfigError):
                return False
        return course.run.is_over(head)

    def append(self, *commits: Commit) -> None:
        """The next ones: all, or none. Raises LedgerCorrupt, and stays as it was, for what does not fit the
        chain."""
        with self._lock:
            self._chain.check_all(commits)
            for commit in commits:
                self._took(commit)
            self._write(commits)

    def commits(self, after: int, limit: int) -> list[Commit]:
        """At most `limit` commits from round `after` + 1 on; none once closed.

        Raises LedgerCorrupt if the file cannot be read any more.
        """
        with self._lock:
            if self._is_closed or after >= self.head_round:
                return []
            if (first := after - (self.head_round - len(self._recent))) >= 0:
                return self._recent[first : first + limit]
            try:
                rows = self._db.execute(_SELECT, (after, limit)).fetchall()
            except sqlite3.Error as e:
                raise LedgerCorrupt(
                    f"{self._path} cannot be read ({e}): move it away, and start again"
                ) from e
            found = [Commit(record=record, signature=signature) for _, record, signature in rows]
            written = after + len(found)
            return found + [c for c in self._unwritten if c.body.round > written][: limit - len(found)]

    def digest_at(self, round_: int) -> bytes | None:
        """Digest of the record of this round; None: it is not here."""
        if round_ == 0:
            return self._run_id
        found = self.commits(round_ - 1, 1) if round_ > 0 else []
        return found[0].digest if found else None

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._db.close()

    # ------------------------------------------------------------------------------------- the file

    def _took(self, commit: Commit) -> None:
        self._recent.append(commit)
        self._recent_bytes += len(commit.record)
        if self._recent_bytes > 2 * _RECENT_BYTES or len(self._recent) > 2 * _RECENT:
            self._forget_recent()
        self.peers.update((admission.index, admission.peer_id) for admission in commit.body.admitted)

    def _forget_recent(self) -> None:
        n = 0
        while self._recent_bytes > _RECENT_BYTES or len(self._recent) - n > _RECENT:
            self._recent_bytes -= len(self._recent[n].record)
            n += 1
        del self._recent[:n]

    def _write(self, commits: Sequence[Commit]) -> None:
        """A disk that is full must not stop the training: what it does not take is tried again."""
        pending = [*self._unwritten, *commits]
        try:
            with self._db:
                self._db.executemany(_INSERT, [(c.body.round, c.record, c.signature) for c in pending])
        except sqlite3.Error as e:
            if not self._unwritten:
                log.warning("%s takes no more commits (%s): they are kept in memory", self._path, e)
            self._unwritten = pending
        else:
            if self._unwritten:
                log.info("%s takes commits again", self._path)
            self._unwritten = []

    def _begin(self, record: bytes, signature: bytes) -> None:
        """From record 0, which says who the founder is. Raises BadMessage."""
        genesis = decode_record(GenesisBody, record)
        self._genesis = record, signature
        self._chain = Chain(self._run_id, genesis.coordinator, recovery=genesis.recovery)

    def _load(self) -> None:
        """Walks the chain as far as it holds."""
        try:
            self._load_genesis()
            why = self._walk()
            if why is not None:
                self._warn(why)
                with self._db:
                    self._db.execute("DELETE FROM record WHERE round > ?", (self._chain.round,))
        except sqlite3.DatabaseError as e:
            # Pages of the file are damaged: what was read until here makes a new one.
            self._warn(str(e))
            self._rewrite()

    def _load_genesis(self) -> None:
        blobs = "CAST(record AS BLOB), CAST(signature AS BLOB)"  # a file may have anything in them
        row = self._db.execute(f"SELECT {blobs} FROM record WHERE round = 0").fetchone()
        if row is None:
            return
        if digest_of(row[0]) == self._run_id:
            self._begin(*row)
            return
        log.warning("%s: record 0 is damaged: it is fetched again", self._path)
        with self._db:
            self._db.execute("DELETE FROM record WHERE round = 0")

    def _walk(self) -> str | None:
        """What is wrong with the first record that does not fit; None: all do."""
        for round_, record, signature in self._db.execute(_SELECT, (0, _ALL)):
            wanted = self._chain.round + 1
            if round_ != wanted:
                return f"record {wanted} is missing, record {round_} is there"
            try:
                commit = Commit(record=record, signature=signature)
                self._chain.check(commit)
            except (LedgerCorrupt, ValueError) as e:
                return str(e)
            self._took(commit)
        return None

    def _warn(self, why: str) -> None:
        log.warning(
            "%s: record %d is damaged (%s): it and what follows is fetched again",
            self._path,
            self._chain.round + 1,
            why,
        )

    def _rewrite(self) -> None:
        assert self._path is not None, "a database in memory has no damaged pages"
        good = self._db.execute(_SELECT, (0, self._chain.round)).fetchall() if self._chain.round else []
        self._db.close()
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._db = _open(self._path, self._run_id)
        if self._genesis is not None:
            good.append((0, *self._genesis))
        with self._db:
            self._db.executemany(_INSERT, good)


def records_with_changes(db: sqlite3.Connection) -> list[CommitBody]:
    """Of a coordinator's database or a node's, not verified, in order: few, and found without decoding the
    others. Raises BadMessage, or sqlite3.Error."""
    # A record with changes is a msgpack list of ten entries or more, and has the name of a setting in it.
    named = " OR ".join(["instr(record, ?)"] * len(_SECTIONS))
    rows = db.execute(
        f"SELECT record FROM record WHERE round > 0 AND substr(record, 1, 1) >= x'9a' AND ({named}) "
        "ORDER BY round",
        _SECTIONS,
    )
    bodies = [decode_record(CommitBody, record) for (record,) in rows]
    return [body for body in bodies if body.changes]


def records_with_committees(db: sqlite3.Connection, up_to: int) -> list[CommitBody]:
    """Those that name a committee, to that round, in order; as `records_with_changes`."""
    # Nothing before the committee's field can be left out: a list of thirteen entries or more.
    rows = db.execute(
        "SELECT record FROM record WHERE round > 0 AND round <= ? AND substr(record, 1, 1) >= x'9d' "
        "ORDER BY round",
        (up_to,),
    )
    bodies = [decode_record(CommitBody, record) for (record,) in rows]
    return [body for body in bodies if body.committee is not None]


def work_in(db: sqlite3.Connection, digest: bytes) -> bytes | None:
    """The signatures of a commit's offers by the digest that it names; None: the database does not have them,
    as a node's copy never has. The caller checks them."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'work'").fetchone():
        return None
    row = db.execute("SELECT signatures FROM work WHERE digest = ?", (digest,)).fetchone()
    return row[0] if row is not None and isinstance(row[0], bytes) else None


def _open(path: Path | None, run_id: bytes) -> sqlite3.Connection:
    """The database of this run, made if there is none. Raises ConfigError, or sqlite3.Error."""
    # Threads use one connection under the copy's lock.
    db = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
    try:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not names:
            _make(db, run_id)
        elif "run" not in names or "record" not in names:
            raise ConfigError(f"{path} is no copy of a ledger: move it away, or choose another --state")
        ours = db.execute("SELECT run_id FROM run").fetchone()
        if ours != (run_id,):
            of = "no run" if ours is None else f"run {bytes(ours[0]).hex()[:16]}"
            raise ConfigError(f"{path} is of {of}, not of run {run_id.hex()[:16]}: move it away")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    return db


def _make(db: sqlite3.Connection, run_id: bytes) -> None:
    """In one transaction: a crash leaves an empty file, which is as good as none."""
    db.executescript(f"BEGIN; {_SCHEMA} INSERT INTO run VALUES (x'{run_id.hex()}'); COMMIT;")
