"""Which snapshots in a store this node has verified itself: a mark beside each of them, across restarts.

The mark is an empty file in the snapshot's folder, whose name has the digest of all that is in it. It says
that what led to the snapshot was a replay of this node's, from base weights or from a snapshot with such a
mark. One without it is not verified: also those that were written before there were marks.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from ...coordinator.protocol.files import sync_folder

log = logging.getLogger("thinwire.node")

MARK: Final = "verified"


def is_marked(folder: Path) -> bool:
    """`folder`: of a snapshot."""
    return (folder / MARK).is_file()


def mark(folder: Path) -> None:
    """Durable when it returns. A disk that does not take it is told of: then the snapshot stays unverified,
    as does one that is gone."""
    try:
        (folder / MARK).touch()
        sync_folder(folder)
    except FileNotFoundError:
        return
    except OSError as e:
        log.warning("%s cannot be marked as verified: %s", folder, e)


def keep_mark(old: Path, new: Path) -> None:
    """The successor of a snapshot has the same bytes. Raises OSError."""
    if is_marked(old):
        (new / MARK).touch()
