"""The log of a node's run as lines of JSON, in the node's folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .metrics import TrackerName

NAME: Final = "track.jsonl"
OLD_NAME: Final = "track.1.jsonl"
MAX_BYTES: Final = 16 * 2**20
"""Then the file becomes the old one, and the old one goes: about 40,000 rounds in each."""


class JsonLines:
    """Appends to `folder`/track.jsonl. What is there was written whole: a line is one write, and one that a
    kill or a full disk has cut is taken away before the next. Numbers that are not finite are null."""

    name: TrackerName = "jsonl"

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._path, self._old, self._max_bytes = folder / NAME, folder / OLD_NAME, max_bytes
        self._fd = -1
        self._n_bytes = 0

    def track(self, entry: Mapping[str, Any]) -> None:
        """Raises OSError."""
        line = json.dumps({k: _plain(v) for k, v in entry.items()}, allow_nan=False).encode() + b"\n"
        if self._fd < 0:
            self._open()
        if self._n_bytes and self._n_bytes + len(line) > self._max_bytes:
            self.close()
            self._path.replace(self._old)
            self._open()
        if os.write(self._fd, line) != len(line):
            self.close()  # the next one begins where this one did
            raise OSError("the disk is full")
        self._n_bytes += len(line)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._n_bytes = _whole_bytes(self._fd)
        os.ftruncate(self._fd, self._n_bytes)


def _whole_bytes(fd: int, step: int = 2**16) -> int:
    """Up to the end of the last whole line."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - step)
        at = os.pread(fd, end - start, start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value
