"""Removing the state of runs from this machine, never that of a running one."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ...compression.errors import ConfigError
from ...coordinator.protocol.files import FolderLock
from ...coordinator.protocol.ledger_copy import COPY_NAME
from ..states.opening import BLOBS
from .finding import LocalRun

log = logging.getLogger("thinwire.cli")

LOCK_NAME: Final = "lock"
_ASIDE: Final = re.compile(r"\.(.+)\.(?:\d+|part)")

_OF_COORDINATOR: Final = (
    *("key", "token", "port", "banned", "keep", "history.json", "result.json", LOCK_NAME, "control.sock"),
    *(BLOBS, *(f"{COPY_NAME}{suffix}" for suffix in ("", "-wal", "-shm"))),
)
"""What a coordinator keeps in its folder, which may have been somebody's before."""


def clean(runs: Sequence[LocalRun]) -> list[LocalRun]:
    """Removes the state of these runs, but of those whose folder is in use, and returns what was removed.

    A node's identity stays: it is the same peer in the next run. What cannot be read stays, too: other
    programs have files named ledger.db.
    """
    return [run for run in runs if _removed(run)]


def _removed(run: LocalRun) -> bool:
    if run.error is not None:
        log.warning("%s stays, it may be no run: remove it by hand (%s)", run.folder, run.error)
        return False
    try:
        lock = FolderLock(run.locked, run.kind)
    except ConfigError as e:  # somebody has started it meanwhile
        log.warning("%s stays: %s", run.folder, e)
        return False
    try:
        # First what makes it a run: a crash after that leaves files without a use.
        (run.folder / COPY_NAME).unlink()
        if run.kind == "node":
            shutil.rmtree(run.folder)
        else:
            _empty(run.folder)
    except OSError as e:
        log.warning("%s cannot be removed: %s", run.folder, e.strerror)
        return False
    finally:
        lock.close()
    return True


def _is_ours(name: str) -> bool:
    """Also of what a process that was killed had written aside."""
    aside = _ASIDE.fullmatch(name)
    return (aside[1] if aside else name) in _OF_COORDINATOR


def _empty(folder: Path) -> None:
    """The lock goes last: who starts a run here meanwhile must not lose its files. Raises OSError."""
    ours = [path for path in folder.iterdir() if _is_ours(path.name)]
    for path in sorted(ours, key=lambda path: path.name == LOCK_NAME):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if left := sorted(p.name for p in folder.iterdir()):
        log.warning("%s has other files, which stay: %s", folder, ", ".join(left[:5]))
        return
    with contextlib.suppress(OSError):
        folder.rmdir()
