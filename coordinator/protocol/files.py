"""Files that are either whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from ...compression.errors import ConfigError


def write_aside(path: Path, data: bytes | Iterable[bytes | memoryview], mode: int = 0o644) -> None:
    """Writes `data`, or its pieces, to `path` so that a crash leaves the old file or the new one. Raises
    OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "wb") as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FolderLock:
    """One process at a time has a folder, from the construction to `close`; a dead one does not keep it.

    Raises ConfigError if another process has it, or if the folder cannot be made. `what`: who uses it.
    """

    def __init__(self, folder: Path, what: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ConfigError(f"{folder} cannot be used: {e.strerror}") from e
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise ConfigError(
                f"{folder} is in use by another {what}, process {holder}: stop it first"
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def close(self) -> None:
        """Gives the lock back; the file stays, or a second process could lock a new one meanwhile."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
