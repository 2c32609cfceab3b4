"""A snapshot that is being downloaded: chunks arrive in any order, and survive a restart.

.incoming-<digest of the manifest>/   manifest, data.safetensors (with holes where chunks are missing)
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from ...compression.errors import ReplicaDiverged
from .format import CHUNK_BYTES, Manifest, Stored

MANIFEST: Final = "manifest"
DATA: Final = "data.safetensors"


class Incoming:
    """For one thread. `adopt`: makes the complete folder a snapshot.

    Raises OSError if there is no room for what is missing.
    """

    def __init__(
        self, folder: Path, encoded: bytes, manifest: Manifest, adopt: Callable[[Path, Manifest], Stored]
    ) -> None:
        self.manifest = manifest
        self._folder, self._adopt = folder, adopt
        self._data = folder / DATA
        folder.mkdir(exist_ok=True)
        write_file(folder / MANIFEST, [encoded])
        self._missing = self._verified()
        needed = sum(manifest.chunk_bytes(i) for i in self._missing)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes needed, {free} free", str(folder)
            )

    @property
    def missing(self) -> list[int]:
        """The chunks that are not here yet, in order."""
        return sorted(self._missing)

    def put(self, i: int, data: bytes) -> None:
        """Chunk `i` has come. Raises ReplicaDiverged, naming it, if it is not what the manifest says (nothing
        is written then), and OSError."""
        self.manifest.check_chunk(i, data)
        fd = os.open(self._data, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            done = 0
            while done < len(data):  # the last write before the disk is full is a short one
                done += os.pwrite(fd, memoryview(data)[done:], i * CHUNK_BYTES + done)
        finally:
            os.close(fd)
        self._missing.discard(i)

    def finish(self) -> Stored:
        """Durable and ready to be loaded when it returns. Raises ValueError while chunks are missing."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} chunks of the snapshot are missing")
        with self._data.open("r+b") as file:
            file.truncate(self.manifest.n_bytes)
            os.fsync(file.fileno())
        return self._adopt(self._folder, self.manifest)

    def _verified(self) -> set[int]:
        """The chunks that an earlier attempt has not left here whole."""
        missing = set(range(len(self.manifest.chunks)))
        if not self._data.exists():
            return missing
        with self._data.open("rb") as file:
            for i in range(len(self.manifest.chunks)):
                try:
                    self.manifest.check_chunk(i, file.read(self.manifest.chunk_bytes(i)))
                    missing.discard(i)
                except ReplicaDiverged:
                    continue
        return missing


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Durable when it returns, if its folder is synced. Raises OSError."""
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
