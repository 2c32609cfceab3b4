"""How snapshots are called on disk: `snapshots/<round, ten digits>-<digest of the manifest>/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

SNAPSHOTS: Final = "snapshots"
"""The folder of them, in that of a run."""

_NAME: Final = re.compile(r"(\d{10})-([0-9a-f]{64})")


def folder_name(round_: int, manifest: bytes) -> str:
    """`manifest`: its digest."""
    return f"{round_:010d}-{manifest.hex()}"


def read_name(name: str) -> tuple[int, str] | None:
    """Round, and the digest in hex; None: no snapshot has such a name."""
    found = _NAME.fullmatch(name)
    return None if found is None else (int(found[1]), found[2])


def newest_round(run: Path) -> int | None:
    """Of the snapshots in the folder of a run, by their names; None: there is none."""
    try:
        names = [read_name(path.name) for path in (run / SNAPSHOTS).iterdir()]
    except OSError:
        return None
    return max((name[0] for name in names if name is not None), default=None)
