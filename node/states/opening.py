"""A run's state folder, a coordinator's or a node's, opened for reading: nothing in it is locked or changed.

    with open_state(Path("gpt-coordinator")) as state:
        print(state.kind, state.head, state.is_over)
        for commit in state.commits():
            ...

Both kinds have the same table of records and the same folder of blobs, so one reader does for both:
`ledger.db` holds record 0 and the commits, `blobs/` what records name by digest, `snapshots/` (a node's) the
replicated state.
The folder may be that of a running process.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote

from ...compression.errors import ConfigError, LedgerCorrupt
from ...coordinator.protocol.chain import Chain, check_genesis, seats_of
from ...coordinator.protocol.files import is_in_use
from ...coordinator.protocol.ledger_copy import (
    COPY_NAME,
    records_with_changes,
    records_with_committees,
    work_in,
)
from ...coordinator.protocol.messages import (
    BadMessage,
    Commit,
    CommitBody,
    GenesisBody,
    SeatEntry,
    digest_of,
)
from ...coordinator.protocol.settings import Course
from ..system.folder import default_folder

MAX_RECORD_BYTES: Final = 16 * 2**20
BLOBS: Final = "blobs"
RUN_FOLDER: Final = re.compile(r"[0-9a-f]{16}")
"""What a node calls the folder of one run, in its own."""

_AT_ONCE: Final = 256
_BUSY_S: Final = 5.0


class RunState:
    """One run in a state folder. `run_id`: digest of record 0; `head`: the newest round that is here, read
    once. Use `open_state`; one thread at a time."""

    def __init__(self, folder: Path, db: sqlite3.Connection) -> None:
        """Raises LedgerCorrupt (record 0, run id) or sqlite3.Error."""
        self.folder, self._db = folder, db
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "record" not in tables:
            raise LedgerCorrupt(f"{folder / COPY_NAME} is no ledger: it has no table of records")
        self.kind: Literal["coordinator", "node"] = "node" if "run" in tables else "coordinator"
        self.record, self.signature = self._record_0()
        self.run_id: bytes = self._run_id()
        (head,) = db.execute("SELECT max(round) FROM record WHERE typeof(round) = 'integer'").fetchone()
        self.head: int = head or 0

    @cached_property
    def genesis(self) -> GenesisBody:
        """Record 0, its signature verified. Raises ConfigError where there is none (a node's folder),
        LedgerCorrupt."""
        if self.record is None or self.signature is None:
            raise ConfigError(
                f"{self.folder} has no record 0: its node has never reached the coordinator, or was of an "
                "earlier thinwire. Use the coordinator's state folder, or join the run once more with "
                f"--state {self._given}"
            )
        try:
            return check_genesis(self.record, self.signature)
        except LedgerCorrupt as e:
            raise LedgerCorrupt(f"{self.folder}: {e}") from e

    @property
    def is_over(self) -> bool:
        """Whether the ledger that is here holds the run's last round. Raises as `genesis` does."""
        return self.course.run.is_over(self.head)

    @property
    def is_running(self) -> bool:
        """Whether a process is at this run. A node's folder has all its runs: it is at the one that was
        written to last."""
        folder = self.folder.resolve()  # its name says whether another one has it
        if self.kind == "coordinator":
            return is_in_use(folder)
        return is_in_use(folder.parent) and runs_in(folder.parent)[:1] == [folder]

    @cached_property
    def course(self) -> Course:
        """The settings that hold after `head`. Raises as `genesis` does."""
        try:
            bodies = [body for body in records_with_changes(self._db) if body.round <= self.head]
            return Course.of(self.genesis.config).after_all(bodies)
        except BadMessage as e:
            raise LedgerCorrupt(f"{self.folder}: {e}") from e

    @property
    def seats(self) -> tuple[SeatEntry, ...]:
        """Of the committee that orders the run after `head`; (): no record has named one. Raises
        LedgerCorrupt."""
        found = self._committees(self.head)
        return seats_of(found[-1]) if found else ()

    def commits(self, after: int = 0) -> Iterator[Commit]:
        """The commits of rounds `after` + 1 to `head`, verified one by one. Raises LedgerCorrupt."""
        genesis, before = self.genesis, self._committees(after)
        chain = Chain(self.run_id, genesis.coordinator, after, recovery=genesis.recovery, before=before)
        while chain.round < self.head:
            rows = self._rows(chain.round)
            if not rows:
                raise LedgerCorrupt(f"{self.folder}: record {chain.round + 1} is missing")
            for record, signature in rows:
                try:
                    commit = Commit(record=record, signature=signature)
                    chain.check(commit)
                except (LedgerCorrupt, ValueError) as e:
                    raise LedgerCorrupt(f"{self.folder}: {e}") from e
                yield commit

    def blob(self, digest: bytes, max_bytes: int) -> bytes | None:
        """A blob that is in the folder, or signatures of offers that are in its ledger, verified; None: it is
        not here, or is not what its name says."""
        found = read_blob(self.blob_path(digest), digest, max_bytes)
        if found is None:
            work = work_in(self._db, digest)
            found = work if work is not None and digest_of(work) == digest else None
        return found

    def blob_path(self, digest: bytes) -> Path:
        """Where a blob lies, if it is here."""
        return self.folder / BLOBS / digest.hex()

    def held_out(self) -> list[tuple[int, float]]:
        """(round, loss in nats) in order; a node's folder has none."""
        if self.kind == "node":
            return []
        return list(
            self._db.execute(
                "SELECT round, loss FROM held_out WHERE typeof(round) = 'integer' AND typeof(loss) = 'real' "
                "ORDER BY round"
            )
        )

    @property
    def _given(self) -> Path:
        """What a node calls its state folder: the run's is in it."""
        return self.folder.parent if self.kind == "node" else self.folder

    def _committees(self, up_to: int) -> list[CommitBody]:
        try:
            return records_with_committees(self._db, up_to)
        except BadMessage as e:
            raise LedgerCorrupt(f"{self.folder}: {e}") from e

    def _rows(self, after: int) -> Sequence[tuple[bytes, bytes]]:
        return self._db.execute(
            "SELECT record, signature FROM record WHERE round > ? AND round <= ? AND length(record) <= ? "
            "ORDER BY round LIMIT ?",
            (after, self.head, MAX_RECORD_BYTES, _AT_ONCE),
        ).fetchall()

    def _record_0(self) -> tuple[bytes | None, bytes | None]:
        row = self._db.execute(
            "SELECT record, signature FROM record WHERE round = 0 AND length(record) <= ?",
            (MAX_RECORD_BYTES,),
        ).fetchone()
        return (None, None) if row is None else (self._bytes(row[0]), self._bytes(row[1]))

    def _run_id(self) -> bytes:
        named = self._db.execute("SELECT run_id FROM run").fetchone() if self.kind == "node" else None
        found = [digest_of(self.record)] if self.record is not None else []
        found += [self._bytes(named[0])] if named is not None else []
        if not found:
            raise LedgerCorrupt(f"{self.folder}: record 0 is missing")
        if found[0] != found[-1]:
            raise LedgerCorrupt(f"{self.folder}: record 0 is of another run than the ledger")
        return found[0]

    def _bytes(self, value: object) -> bytes:
        """Of a column of blobs: SQLite lets a file have anything in it, and `bytes` of a number are as many.
        Raises LedgerCorrupt."""
        if not isinstance(value, bytes):
            raise LedgerCorrupt(
                f"{self.folder / COPY_NAME} is no ledger: it has a {type(value).__name__} for bytes"
            )
        return value


@contextmanager
def open_state(path: Path) -> Iterator[RunState]:
    """The run in a coordinator's folder, a node's, or a node's folder of one run.

    Raises ConfigError (nothing there, several runs) or LedgerCorrupt.
    """
    folder = run_folder(path)
    try:
        with closing(_connected(folder / COPY_NAME)) as db:
            yield RunState(folder, db)
    except sqlite3.Error as e:
        raise LedgerCorrupt(f"{folder / COPY_NAME} cannot be read: {e}") from e


def run_folder(path: Path) -> Path:
    """The folder with the ledger: `path` itself, or the only run in it. Raises ConfigError."""
    if (path / COPY_NAME).is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder")
    runs = runs_in(path)
    if len(runs) == 1:
        return runs[0]
    if not runs:
        raise ConfigError(
            f"{path} is no state folder: neither a ledger nor runs are in it. A coordinator's is what its "
            f"--state says; a node logs where its own is when it starts"
        )
    raise ConfigError(f"{path} holds {len(runs)} runs, name one (newest first): {', '.join(map(str, runs))}")


def runs_in(path: Path) -> list[Path]:
    """Folders of the runs in a node's state folder, the one that was written to last first."""
    try:
        found = [p for p in path.iterdir() if RUN_FOLDER.fullmatch(p.name) and (p / COPY_NAME).is_file()]
    except OSError:
        return []
    return sorted(found, key=lambda p: -(p / COPY_NAME).stat().st_mtime)


def read_blob(path: Path, digest: bytes, max_bytes: int) -> bytes | None:
    """Verified; None: it cannot be read, is longer, or not what its name says."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError:
        return None
    return data if len(data) <= max_bytes and digest_of(data) == digest else None


@dataclass(frozen=True, slots=True)
class Remains:
    """What this machine has of a run in a node's default folder: `head` of its ledger, whether it `is_over`
    (False where that cannot be told)."""

    folder: Path
    head: int
    is_over: bool


def remains_of(run_id: bytes, environ: Mapping[str, str]) -> Remains | None:
    """For a run whose coordinator does not answer: the furthest state in this user's default folders."""
    found = [
        remains
        for path in sorted(default_folder(environ).glob(f"*/{run_id.hex()[:16]}"))
        if (remains := remains_in(path)) is not None
    ]
    return max(found, key=lambda r: r.head, default=None)


def remains_in(path: Path) -> Remains | None:
    """What a folder has of its run; None: it cannot be read, or has no record 0 (see `genesis`)."""
    try:
        with open_state(path) as state:
            return None if state.record is None else Remains(path, state.head, state.is_over)
    except (ConfigError, LedgerCorrupt, OSError):
        return None


def _connected(path: Path) -> sqlite3.Connection:
    """Read only. A file that nobody writes is read as it is: SQLite would leave files of its own beside it.
    Where there is a log of writes, a process has it open, or was killed: then the log is read, too."""
    is_still = not path.with_name(f"{path.name}-wal").exists()
    for immutable in (is_still, True):  # the process may have ended in between
        uri = f"file:{quote(str(path.absolute()))}?mode=ro{'&immutable=1' if immutable else ''}"
        db = sqlite3.connect(uri, uri=True, timeout=_BUSY_S)
        try:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            db.close()
            if immutable:
                raise
        except BaseException:
            db.close()
            raise
        else:
            return db
    raise AssertionError("unreachable")
