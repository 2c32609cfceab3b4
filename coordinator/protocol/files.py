"""Files that are whole or absent: written aside, synced, renamed; what only one process may have open."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, Protocol

from ...compression.errors import ConfigError, DiskError

_DISK_ERRNOS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_DISK_CODES: Final = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
}


def disk_error(error: OSError | sqlite3.Error, place: Path | None = None) -> DiskError | None:
    """What to tell of a disk that does not take what is written at `place`, or where the error says; None: it
    is something else."""
    why = str(error)
    if isinstance(error, sqlite3.Error):
        # It has a code only if SQLite itself has raised it. The low byte: the kind.
        is_of_disk = getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK_CODES
        is_of_disk = is_of_disk and (place is None or place.parent.is_dir())
    else:
        is_of_disk, why = error.errno in _DISK_ERRNOS, error.strerror or why
        place = place or (Path(os.fsdecode(error.filename)) if error.filename else None)
    if not is_of_disk:
        return None
    look = "df -h" if place is None else f"df -h {place if place.is_dir() else place.parent}"
    return DiskError(
        f"{place or 'a file'} cannot be written: {why}. Make room on that disk, if it is full ({look}); then "
        f"the same command goes on"
    )


def write_aside(path: Path, data: bytes | Iterable[bytes | memoryview], mode: int = 0o644) -> None:
    """Writes `data`, or its pieces, to `path` so that a crash leaves the old file or the new one. Raises
    OSError, which names `path`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException as e:
        aside.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno and e.filename is None:
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise
    sync_folder(path.parent)


def remove_asides(folder: Path) -> None:
    """What a process that was killed while it wrote aside has left. Nobody else writes to `folder`."""
    for path in folder.glob(".*"):
        if path.suffix[1:].isdigit() and path.is_file():
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Held(Protocol):
    """Has files open whose end tells others that this process is gone."""

    def close_in_child(self) -> None:
        """In a process that this one has forked: closes that process's copies, and nothing else."""
        ...


_HELD: Final[weakref.WeakSet[Held]] = weakref.WeakSet()


def keep_from_children(held: Held) -> None:
    """Processes that this one forks from now on, such as the workers of a data loader, do not have what
    `held` has: else a lock would stay, and a daemon go on, for as long as they live."""
    _register()
    _HELD.add(held)


@cache
def _register() -> None:
    """Once for a process."""
    os.register_at_fork(after_in_child=_close_all_in_child)


def _close_all_in_child() -> None:
    for held in list(_HELD):
        held.close_in_child()


LOCK_NAME: Final = "lock"


def is_in_use(folder: Path) -> bool:
    """Whether a process holds the folder's lock, which is not taken for longer than a look."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


class FolderInUse(ConfigError):
    """Another process has the folder."""


def refuse_in_use(folder: Path | None, what: str) -> None:
    """Raises FolderInUse as `FolderLock` does, before anything that takes its time."""
    if folder is not None and is_in_use(folder):
        raise _in_use(folder, what)


def _in_use(folder: Path, what: str) -> FolderInUse:
    with (folder / LOCK_NAME).open("rb") as file:
        holder = file.read(32).decode("ascii", "replace").strip() or "unknown"
    return FolderInUse(f"{folder} is in use by another {what}, process {holder}: stop it first")


KEY_NAMES: Final = {"node": "identity.key", "coordinator": "key"}
"""Of the key in a state folder, by which it is known whose that is."""


def _refuse_others(folder: Path, what: str) -> None:
    """Raises ConfigError."""
    found = [who for who, name in KEY_NAMES.items() if os.path.exists(folder / name)]
    if found and what in KEY_NAMES and what not in found:
        raise ConfigError(f"{folder} is a {found[0]}'s state folder: name another --state for the {what}")


class FolderLock:
    """One process at a time has a folder, from the construction to `close`; a dead one does not keep it.

    Raises FolderInUse, or ConfigError if the folder cannot be made, or is a node's and `what`, who is to use
    it, a coordinator; or the other way round.
    """

    def __init__(self, folder: Path, what: str) -> None:
        _refuse_others(folder, what)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(
                folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as e:
            raise ConfigError(f"{folder} cannot be used: {e.strerror}") from e
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise _in_use(folder, what) from None
        with suppress(OSError):  # who holds it is for people to know: a full disk keeps nobody out
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{os.getpid()}\n".encode())
        keep_from_children(self)

    def close_in_child(self) -> None:
        """The lock stays the parent's."""
        self.close()

    def close(self) -> None:
        """Gives the lock back; the file stays, or a second process could lock a new one meanwhile."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
