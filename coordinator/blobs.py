"""Blobs on the coordinator's disk: immutable bytes in files that are named by their BLAKE3 digest."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from thinwire.coordinator.files import sync_folder
from thinwire.coordinator.messages import BadMessage

log = logging.getLogger("thinwire.coordinator")

PROTECTED_ROUNDS = 64
"""Payloads of this many newest rounds are never pruned: a node may still be catching up."""


@dataclass(slots=True)
class _Blob:
    n_bytes: int
    age: int
    """Orders blobs from the oldest on."""
    round: int | None = None
    is_pinned: bool = False


class BlobWriter:
    """Takes a blob chunk by chunk, aside; `finish` makes it a blob, `abort` forgets it."""

    def __init__(self, store: BlobStore, digest: bytes, aside: Path) -> None:
        self._store, self._digest, self._aside = store, digest, aside
        self._hash = blake3()
        self._file: BinaryIO = aside.open("xb")
        self.n_bytes = 0

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.n_bytes += len(chunk)

    def finish(self) -> int:
        """Durable when it returns the blob's size. Raises BadMessage if the bytes do not fit the digest."""
        if self._hash.digest() != self._digest:
            self.abort()
            raise BadMessage(f"blob {self._digest.hex()[:16]}: its bytes do not fit its digest")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._store.adopt(self._digest, self._aside, self.n_bytes)
        return self.n_bytes

    def abort(self) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)


class BlobStore:
    """At most `quota_bytes`, except for what is pinned or belongs to the newest rounds.

    Not thread-safe: callers serialise. Half-written files of an earlier process are removed.
    """

    def __init__(self, path: Path, quota_bytes: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._quota_bytes = quota_bytes
        self._blobs: dict[bytes, _Blob] = {}
        self._newest_round = 0
        self._scan()
        self._ages = count(len(self._blobs))
        self._asides = count()
        self.n_bytes = sum(blob.n_bytes for blob in self._blobs.values())

    def put(self, digest: bytes, data: bytes | Iterable[bytes]) -> int:
        """Stores a blob and returns its size. Raises BadMessage if the bytes do not fit the digest."""
        writer = self.writer(digest)
        try:
            for chunk in [data] if isinstance(data, bytes) else data:
                writer.write(chunk)
        except BaseException:
            writer.abort()
            raise
        return writer.finish()

    def writer(self, digest: bytes) -> BlobWriter:
        """For bytes that arrive bit by bit."""
        return BlobWriter(self, digest, self._path / f"{digest.hex()}.{next(self._asides)}.part")

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blobs

    def size(self, digest: bytes) -> int | None:
        """Bytes of the blob; None: it is not here."""
        blob = self._blobs.get(digest)
        return None if blob is None else blob.n_bytes

    def open(self, digest: bytes) -> BinaryIO:
        """For reading in chunks; stays readable if the blob is pruned meanwhile. Raises KeyError."""
        if digest not in self._blobs:
            raise KeyError(digest.hex())
        return self._file(digest).open("rb")

    def read(self, digest: bytes) -> bytes:
        """The whole blob. Raises KeyError."""
        with self.open(digest) as f:
            return f.read()

    def pin(self, digest: bytes) -> None:
        """The run's own: base weights, held-out text. Never pruned. Raises KeyError."""
        self._blobs[digest].is_pinned = True

    def mark(self, digest: bytes, round_: int) -> None:
        """The blob is a payload of this round; does nothing if it is not here."""
        self._newest_round = max(self._newest_round, round_)
        blob = self._blobs.get(digest)
        if blob is not None:
            blob.round = round_ if blob.round is None else max(blob.round, round_)

    def adopt(self, digest: bytes, aside: Path, n_bytes: int) -> None:
        """A finished, verified file becomes a blob."""
        if digest in self._blobs:
            aside.unlink()
            return
        aside.rename(self._file(digest))
        sync_folder(self._path)
        self._blobs[digest] = _Blob(n_bytes, next(self._ages))
        self.n_bytes += n_bytes
        self._prune(keep=digest)

    def _prune(self, keep: bytes) -> None:
        protected_from = self._newest_round - PROTECTED_ROUNDS + 1
        free = sorted(
            (blob.age, digest)
            for digest, blob in self._blobs.items()
            if not blob.is_pinned and digest != keep and (blob.round is None or blob.round < protected_from)
        )
        for _, digest in free:
            if self.n_bytes <= self._quota_bytes:
                return
            self._file(digest).unlink()
            self.n_bytes -= self._blobs.pop(digest).n_bytes
        if self.n_bytes > self._quota_bytes:
            log.warning(
                "blobs take %d bytes, over the quota of %d: the newest %d rounds are kept whole",
                *(self.n_bytes, self._quota_bytes, PROTECTED_ROUNDS),
            )

    def _file(self, digest: bytes) -> Path:
        return self._path / digest.hex()

    def _scan(self) -> None:
        found = []
        for entry in self._path.iterdir():
            if entry.suffix == ".part":
                entry.unlink()
            elif _is_digest(entry.name):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, entry.name, stat.st_size))
        for age, (_, name, n_bytes) in enumerate(sorted(found)):
            self._blobs[bytes.fromhex(name)] = _Blob(n_bytes, age)


def _is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")
