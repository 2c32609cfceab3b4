"""Files that are either whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


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
