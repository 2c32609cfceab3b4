"""Blobs on the coordinator's disk: immutable bytes in files that are named by their BLAKE3 digest."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from shutil import disk_usage
from typing import BinaryIO, Final

from blake3 import blake3

from .protocol.files import sync_folder
from .protocol.messages import BadMessage


@dataclass(slots=True)
class _Blob:
    n_bytes: int
    is_pinned: bool = False
    offered: int | None = None
    """The newest round in which it was uploaded or offered, until that is long over."""
    counted: int | None = None
    """The newest round whose commit names it, until that is released."""


class BlobWriter:
    """Takes a blob chunk by chunk, aside; `finish` makes it a blob, `abort` forgets it. `reserved_bytes`: how
    many are to come, 0 if that is not known; `owner`: the peer whose upload it is, "": nobody's."""

    is_quick: Final = False

    def __init__(
        self, store: BlobStore, digest: bytes, aside: Path, reserved_bytes: int, owner: str = ""
    ) -> None:
        self._store, self._digest, self._path = store, digest, aside
        self.reserved_bytes = self.expected_bytes = reserved_bytes
        self.owner = owner
        self._hash = blake3()
        self._file: BinaryIO = aside.open("xb")
        store.reserved_bytes += reserved_bytes
        self.n_bytes = 0
        self.is_over = self._is_synced = False
        """It is a blob, or will never be one."""
        self.watchers: set[Callable[[], None]] = set()
        """Are told whenever there are more bytes, and when it is over."""

    def write(self, chunk: bytes) -> None:
        """The next bytes. Raises OSError; BadMessage: it had to give way."""
        if self.is_over:
            raise BadMessage("what this upload had reserved was needed for others")
        self._file.write(chunk)
        self._file.flush()  # for who reads it meanwhile
        self._hash.update(chunk)
        self.n_bytes += len(chunk)
        self.tell()

    @property
    def is_here(self) -> bool:
        """The blob is in the store, by this upload or by another one that was quicker."""
        return self._digest in self._store

    def open(self) -> BinaryIO:
        """What is there, for reading; stays readable whatever becomes of it. Raises OSError."""
        if not self.is_here:
            with contextlib.suppress(FileNotFoundError):  # `sync` gives it the blob's name just now
                return self._path.open("rb")
        return self._store.file(self._digest).open("rb")

    def sync(self) -> None:
        """Brings all onto the disk, so that `finish` is quick. In any thread, while nothing else is called.
        Raises OSError; BadMessage if the bytes do not fit the digest."""
        if self._hash.digest() != self._digest:
            raise BadMessage(f"blob {self._digest.hex()[:16]}: its bytes do not fit its digest")
        os.fsync(self._file.fileno())
        self._file.close()
        self._path = self._path.rename(self._store.file(self._digest))  # one of the same bytes may be there
        sync_folder(self._path.parent)
        self._is_synced = True

    def finish(self) -> int:
        """Durable when it returns the blob's size. Raises like `sync`."""
        try:
            if not self._is_synced:
                self.sync()
            self._store.adopt(self._digest, self.n_bytes, self.owner)
        except BaseException:
            self.abort()
            raise
        self._end()
        return self.n_bytes

    def abort(self) -> None:
        """Nothing is left of it. Raises OSError."""
        self._end()
        try:
            self._file.close()  # what it could not write for want of room, it tries again
        finally:
            if not (self.is_here and self._path == self._store.file(self._digest)):  # else it has come twice
                self._path.unlink(missing_ok=True)

    def _end(self) -> None:
        self._store.reserved_bytes -= self.reserved_bytes
        self.reserved_bytes = 0
        self._store.over(self._digest, self)
        self.is_over = True
        self.tell()

    def tell(self) -> None:
        """Wakes who watches."""
        for watcher in list(self.watchers):
            watcher()


class BlobStore:
    """Keeps everything until it is released. `reserved_bytes`: of uploads that are under way.

    Not thread-safe, but for `BlobWriter.sync`: callers serialise. Half-written files of an earlier process
    are removed.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.reserved_bytes = 0
        self._blobs: dict[bytes, _Blob] = {}
        # By round, the oldest first.
        self._offered: dict[int, set[bytes]] = {}
        self._counted: dict[int, set[bytes]] = {}
        self._unnamed: dict[bytes, str] = {}
        """Whose upload a blob was, as long as no offer has named it; the oldest first."""
        self._asides = count()
        self._coming: dict[bytes, list[BlobWriter]] = {}
        self._scan()
        self.n_bytes = sum(blob.n_bytes for blob in self._blobs.values())
        self.pinned_bytes = 0

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

    def free_bytes(self) -> int:
        """That the disk has left for this user."""
        return disk_usage(self._path).free

    def writer(self, digest: bytes, n_bytes: int = 0, owner: str = "") -> BlobWriter:
        """For bytes that arrive bit by bit, `n_bytes` of them, for which room is reserved."""
        aside = self._path / f"{digest.hex()}.{next(self._asides)}.part"
        writer = BlobWriter(self, digest, aside, n_bytes, owner)
        self._coming.setdefault(digest, []).append(writer)
        return writer

    def give_way(self, owner: str, n_bytes: int) -> bool:
        """Ends an upload of whoever has reserved most, if that is more than `owner` would have with so many
        bytes besides; whether there was one."""
        peers = [writer for writers in self._coming.values() for writer in writers if writer.owner]
        coming = [writer for writer in peers if writer.n_bytes < writer.expected_bytes]
        reserved = Counter[str]()
        for writer in coming:
            reserved[writer.owner] += writer.reserved_bytes
        most = max(coming, key=lambda w: (reserved[w.owner], w.reserved_bytes), default=None)
        if most is None or reserved[most.owner] <= reserved[owner] + n_bytes:
            return False
        with contextlib.suppress(OSError):
            most.abort()
        return True

    def drop_unnamed(self, owner: str, n_bytes: int) -> bool:
        """Deletes an upload that no offer has named, of who has most of them, if that is more than `owner`
        would have with so many bytes besides; whether there was one."""
        of_owners = Counter[str]()
        for digest, whose in self._unnamed.items():
            of_owners[whose] += self._blobs[digest].n_bytes
        most = max(of_owners, key=of_owners.__getitem__, default=owner)
        if of_owners[most] <= of_owners[owner] + n_bytes:
            return False
        digest = next(digest for digest, whose in self._unnamed.items() if whose == most)
        self.named(digest)
        blob = self._blobs[digest]
        if blob.offered is not None:
            _take(self._offered, digest, blob.offered)
            blob.offered = None
        self._delete_if_free(digest)
        return True

    def coming(self, digest: bytes) -> BlobWriter | None:
        """By which the blob comes that is not here yet: of several, which has most; None: it does not."""
        return max(self._coming.get(digest, ()), key=lambda writer: writer.n_bytes, default=None)

    def over(self, digest: bytes, writer: BlobWriter) -> None:
        """It writes no more."""
        coming = self._coming.get(digest, [])
        if writer in coming:
            coming.remove(writer)
            if not coming:
                del self._coming[digest]

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._blobs

    def size(self, digest: bytes) -> int | None:
        """Bytes of the blob; None: it is not here."""
        blob = self._blobs.get(digest)
        return None if blob is None else blob.n_bytes

    def open(self, digest: bytes) -> BinaryIO:
        """For reading in chunks; stays readable if the blob is deleted meanwhile. Raises KeyError."""
        if digest not in self._blobs:
            raise KeyError(digest.hex())
        return self.file(digest).open("rb")

    def read(self, digest: bytes) -> bytes:
        """The whole blob. Raises KeyError."""
        with self.open(digest) as f:
            return f.read()

    def pin(self, digest: bytes) -> None:
        """The run's own: base weights, held-out text. Never released. Raises KeyError."""
        blob = self._blobs[digest]
        self.pinned_bytes += 0 if blob.is_pinned else blob.n_bytes
        blob.is_pinned = True

    def mark_offered(self, digest: bytes, round_: int) -> None:
        """The blob may become a payload of this round; does nothing if it is not here."""
        blob = self._blobs.get(digest)
        if blob is not None and (blob.offered is None or blob.offered < round_):
            _move(self._offered, digest, blob.offered, round_)
            blob.offered = round_

    def named(self, digest: bytes) -> None:
        """An offer names the blob, or a commit."""
        self._unnamed.pop(digest, None)

    def mark_counted(self, digest: bytes, round_: int) -> None:
        """The commit of this round names the blob; does nothing if it is not here."""
        blob = self._blobs.get(digest)
        if blob is not None and (blob.counted is None or blob.counted < round_):
            _move(self._counted, digest, blob.counted, round_)
            blob.counted = round_
            self.named(digest)

    def counted(self) -> list[tuple[bytes, int]]:
        """What commits name, and the round of the newest one that does, in the order of rounds."""
        return [(digest, round_) for round_, digests in self._counted.items() for digest in digests]

    def mark_rest(self, round_: int) -> None:
        """Whatever nobody has marked or pinned was uploaded for this round, before a restart."""
        for digest, blob in self._blobs.items():
            if not blob.is_pinned and blob.offered is None and blob.counted is None:
                self.mark_offered(digest, round_)

    def oldest_counted(self) -> int | None:
        """The oldest round of which counted payloads are here."""
        return next(iter(self._counted), None)

    def release(self, *, counted_to: int, offered_to: int) -> int:
        """Deletes what was counted up to the one round and offered up to the other, and not later.

        Returns the newest counted round that was released now, 0 for none.
        """
        newest = 0
        for round_ in _up_to(self._counted, counted_to):
            newest = max(newest, round_)
            for digest in self._counted.pop(round_):
                self._blobs[digest].counted = None
                self._delete_if_free(digest)
        for round_ in _up_to(self._offered, offered_to):
            for digest in self._offered.pop(round_):
                self._blobs[digest].offered = None
                self._delete_if_free(digest)
        return newest

    def discard(self, digest: bytes) -> None:
        """Deletes a blob that nobody has marked or pinned; nothing happens if it is not here."""
        if digest in self._blobs:
            self._delete_if_free(digest)

    def adopt(self, digest: bytes, n_bytes: int, owner: str = "") -> None:
        """The file that was renamed becomes a blob, as an upload of this peer's. Raises BadMessage: it came
        twice at once, and what came first was released meanwhile."""
        if digest in self._blobs:
            return
        if not self.file(digest).exists():
            raise BadMessage(f"blob {digest.hex()[:16]} was released while it came again")
        self._blobs[digest] = _Blob(n_bytes)
        if owner:
            self._unnamed[digest] = owner
        self.n_bytes += n_bytes
        for writer in self._coming.get(digest, ()):
            writer.tell()  # who waits for the slower one need not

    def _delete_if_free(self, digest: bytes) -> None:
        blob = self._blobs[digest]
        if blob.is_pinned or blob.offered is not None or blob.counted is not None:
            return
        self.file(digest).unlink(missing_ok=True)
        del self._blobs[digest]
        self.named(digest)
        self.n_bytes -= blob.n_bytes

    def file(self, digest: bytes) -> Path:
        """Where the blob is, once it is here."""
        return self._path / digest.hex()

    def _scan(self) -> None:
        for entry in self._path.iterdir():
            if entry.suffix == ".part":
                entry.unlink()
            elif _is_digest(entry.name):
                self._blobs[bytes.fromhex(entry.name)] = _Blob(entry.stat().st_size)


def _move(index: dict[int, set[bytes]], digest: bytes, old: int | None, new: int) -> None:
    if old is not None:
        _take(index, digest, old)
    is_late = new not in index and index and new < next(reversed(index))
    index.setdefault(new, set()).add(digest)
    if is_late:  # seldom: a payload came long after its round
        in_order = sorted(index.items())
        index.clear()
        index.update(in_order)


def _take(index: dict[int, set[bytes]], digest: bytes, round_: int) -> None:
    index[round_].discard(digest)
    if not index[round_]:
        del index[round_]


def _up_to(index: dict[int, set[bytes]], round_: int) -> list[int]:
    return list(takewhile(lambda marked: marked <= round_, index))


def _is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")
