"""A node's snapshots on disk: whole ones only, each in a folder that is written aside, synced and renamed.

    0000000050-<digest of the manifest>/   manifest, data.safetensors, and if it is the node's own: local
                   (several ranks: local.0-of-2, local.1-of-2); `verified`, if it is
    .writing-*     being written; removed at start        .removed-*   on its way out; removed at start
    .replaced-*    makes room for its successor; put back at start if that did not come
    .incoming-*    a download that is not complete; stays

One process uses a folder at a time; within it every method may be called from any thread.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import BinaryIO, Final

from torch import Tensor

from ...compression.errors import ReplicaDiverged
from ...coordinator.protocol.blob_streams import Base
from ...coordinator.protocol.files import sync_folder
from ...coordinator.protocol.messages import Changes, digest_of, encode_record
from .format import (
    CHUNK_BYTES,
    MAX_CHUNKS,
    VERSION,
    ChunkDigests,
    Manifest,
    Stored,
    data_of,
    max_manifest_bytes,
    read_manifest,
    tensors_of,
)
from .incoming import DATA, MANIFEST, Incoming, write_file
from .local_state import LocalState, decode, encode
from .names import folder_name, read_name
from .verified import is_marked, keep_mark

log = logging.getLogger("thinwire.node")

LOCAL: Final = "local"
READING_S: Final = 60.0
"""A snapshot of which a chunk was read within this time is being downloaded by somebody."""

_UNFINISHED: Final = (".incoming-", ".writing-", ".removed-", ".replaced-")


class SnapshotStore:
    """The newest `keep` snapshots of a run; implements `node.links.base.Shelf`.

    What is no whole snapshot of this run is told of in the log, left alone and never counted or served.
    Raises OSError where the folder cannot be used. `clock`: monotonic seconds. `read_only`: the folder may be
    another process's: nothing in it is made, tidied or removed, and no method that writes may be called.
    """

    def __init__(
        self,
        folder: Path,
        run_id: bytes,
        keep: int = 3,
        clock: Callable[[], float] = time.monotonic,
        *,
        read_only: bool = False,
    ) -> None:
        self._folder, self._run_id, self._keep, self._clock = folder, run_id, keep, clock
        self._lock = threading.RLock()
        self._numbers = count()
        self._manifests: dict[Stored, Manifest] = {}
        self._read_s: dict[Stored, float] = {}
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
            self._clean()
        self._scan()
        self._index()

    # ----------------------------------------------------------------------------------- writing

    def write(
        self,
        tensors: Mapping[str, Tensor],
        *,
        round: int,
        commit: bytes,
        fingerprint: bytes,
        local: LocalState | None = None,
        changes: Changes = (),
    ) -> Stored:
        """Durable when it returns. `tensors`: the replicated parameters, which must not change meanwhile; no
        more than one of them is copied at a time.

        Raises OSError (a full disk) with nothing half-written left behind.
        """
        aside = self.aside()
        try:
            digests = ChunkDigests()
            write_file(aside / DATA, _through(digests, data_of(tensors)))
            if local is not None:
                write_file(aside / local_name(), encode(local))
            return self._finish(aside, digests, round, commit, fingerprint, changes)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def aside(self) -> Path:
        """A folder to write a snapshot in, file by file: to be given to `complete`, or removed."""
        return self._aside("writing")

    def complete(
        self, aside: Path, *, round: int, commit: bytes, fingerprint: bytes, changes: Changes = ()
    ) -> Stored:
        """A folder that has all but its manifest (the data may come from several processes) becomes a
        snapshot. Raises OSError, and the folder is gone."""
        try:
            digests = ChunkDigests()
            with (aside / DATA).open("rb") as file:
                while piece := file.read(CHUNK_BYTES):
                    digests.update(piece)
            return self._finish(aside, digests, round, commit, fingerprint, changes)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _finish(
        self,
        aside: Path,
        digests: ChunkDigests,
        round: int,
        commit: bytes,
        fingerprint: bytes,
        changes: Changes,
    ) -> Stored:
        manifest = Manifest(
            version=VERSION,
            run_id=self._run_id,
            round=round,
            commit=commit,
            fingerprint=fingerprint,
            n_bytes=digests.n_bytes,
            chunks=digests.digests(),
            changes=changes,
        )
        write_file(aside / MANIFEST, [encode_record(manifest)])
        return self._adopt(aside, manifest)

    def incoming(self, manifest: bytes) -> Incoming:
        """Where the snapshot with this manifest is downloaded to: whatever of it is already here from an
        earlier attempt is kept, an unfinished download of another one is given up.

        Raises ReplicaDiverged for a manifest that cannot be read or is of another run, OSError if there is no
        room for the whole.
        """
        read = read_manifest(manifest, self._run_id)
        folder = self._folder / f".incoming-{digest_of(manifest).hex()}"
        self.give_up_incoming(but=folder)
        return Incoming(folder, manifest, read, self._adopt)

    def give_up_incoming(self, but: Path | None = None) -> None:
        """Removes what unfinished downloads have left."""
        for folder in self._folder.glob(".incoming-*"):
            if folder != but:
                shutil.rmtree(folder)

    def discard(self, stored: Stored) -> None:
        """Removes a snapshot; nothing happens if it is not here any more."""
        with self._lock:
            if self._manifests.pop(stored, None) is None:
                return
            self._read_s.pop(stored, None)
            self._index()
            self._remove(self.folder_of(stored))

    # ----------------------------------------------------------------------------------- reading

    def stored(self) -> list[Stored]:
        """All of them, the newest last."""
        with self._lock:
            return sorted(self._manifests, key=lambda s: s.round)

    def load(self, stored: Stored) -> tuple[Manifest, dict[str, Tensor]]:
        """The snapshot, every chunk verified; tensors on the CPU, in memory once.

        Raises ReplicaDiverged, naming the chunk, for what is damaged; KeyError when it is not here.
        """
        with self._lock:
            manifest = self._manifests[stored]
        data = bytearray(manifest.n_bytes)
        self._read(stored, manifest, memoryview(data))
        return manifest, tensors_of(data)

    def verified(self, stored: Stored) -> tuple[Manifest, Path]:
        """The snapshot's manifest and the file with its data, every chunk of which was read and verified.

        Raises as `load` does.
        """
        with self._lock:
            manifest = self._manifests[stored]
        self._read(stored, manifest, None)
        return manifest, self.folder_of(stored) / DATA

    def _read(self, stored: Stored, manifest: Manifest, into: memoryview | None) -> None:
        """Verifies every chunk; keeps them if there is room for all."""
        spare = memoryview(bytearray(CHUNK_BYTES if into is None else 0))
        try:
            with (self.folder_of(stored) / DATA).open("rb") as file:
                for i in range(len(manifest.chunks)):
                    part = spare if into is None else into[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
                    part = part[: manifest.chunk_bytes(i)]
                    manifest.check_chunk(i, part[: file.readinto(part)])
                if file.read(1):
                    raise ReplicaDiverged(f"the snapshot of round {stored.round} has more bytes than it says")
        except OSError as e:
            raise ReplicaDiverged(f"the snapshot of round {stored.round} cannot be read: {e}") from e

    def is_verified(self, stored: Stored) -> bool:
        """Whether this node has verified it, see `snapshots.verified`."""
        return is_marked(self.folder_of(stored))

    def folder_of(self, stored: Stored) -> Path:
        return self._folder / folder_name(stored.round, stored.manifest)

    def local(self, stored: Stored) -> LocalState | None:
        """The local state that was saved beside it; None: there is none. Raises BadLocalState."""
        return read_local(self.folder_of(stored), local_name())

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        """A manifest or a chunk, verified before anybody gets it; it stays readable whatever happens to the
        snapshot. Raises KeyError: it is not here, or damaged."""
        with self._lock:
            stored, i = self._where[digest]
            manifest = self._manifests[stored]
            self._read_s[stored] = self._clock()
        try:
            if i is None:
                data = (self.folder_of(stored) / MANIFEST).read_bytes()
            else:
                with (self.folder_of(stored) / DATA).open("rb") as file:
                    file.seek(i * CHUNK_BYTES)
                    data = file.read(manifest.chunk_bytes(i))
        except OSError as e:
            raise KeyError(f"{digest.hex()[:16]}: {e}") from e
        if digest_of(data) != digest:
            what = "manifest" if i is None else f"chunk {i}"
            log.warning("%s of the snapshot of round %d is damaged and not served", what, stored.round)
            raise KeyError(digest.hex())
        return BytesIO(data), len(data)

    def earlier_chunk(self, i: int, manifest: Manifest) -> Base | None:
        """What stands at the place of chunk `i` in the newest snapshot here that is as long as that one;
        None: there is none, or its bytes are damaged. From any thread."""
        for stored in reversed(self.stored()):
            with self._lock:
                known = self._manifests.get(stored)
            if known is None or known.n_bytes != manifest.n_bytes or known.round == manifest.round:
                continue
            try:
                file, _ = self.open(known.chunks[i])
            except KeyError:
                return None
            with file:
                return Base(known.chunks[i], file.read())
        return None

    # ----------------------------------------------------------------------------------- inside

    def _adopt(self, aside: Path, manifest: Manifest) -> Stored:
        """A folder that is complete becomes a snapshot, and the oldest ones go."""
        sync_folder(aside)
        stored = Stored.of(manifest)
        final = self.folder_of(stored)
        with self._lock:
            replaced = self._folder / f".replaced-{folder_name(stored.round, stored.manifest)}"
            if final.exists():
                _keep_local(final, aside)
                keep_mark(final, aside)
                final.rename(replaced)  # a crash here: the next start puts it back
            aside.rename(final)
            sync_folder(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._manifests[stored] = manifest
            self._prune(stored)
            self._index()
        return stored

    def _prune(self, newest: Stored) -> None:
        """Down to `keep`. One more may stay: the last that somebody read from, while they still do."""
        old = [stored for stored in self.stored()[: -self._keep] if stored != newest]
        now_s = self._clock()
        being_read = [s for s in old if s in self._read_s and now_s - self._read_s[s] <= READING_S]
        spare = max(being_read, key=lambda s: self._read_s[s], default=None)
        for stored in old:
            if stored != spare:
                del self._manifests[stored]
                self._read_s.pop(stored, None)
                self._remove(self.folder_of(stored))

    def _index(self) -> None:
        """Digest -> the snapshot, and the chunk's number; None: the manifest."""
        self._where: dict[bytes, tuple[Stored, int | None]] = {}
        for stored, manifest in self._manifests.items():
            self._where[stored.manifest] = stored, None
            self._where.update({digest: (stored, i) for i, digest in enumerate(manifest.chunks)})

    def _aside(self, what: str) -> Path:
        aside = self._folder / f".{what}-{os.getpid()}-{next(self._numbers)}"
        aside.mkdir()
        return aside

    def _remove(self, folder: Path) -> None:
        """First out of the way, so that a crash leaves no snapshot without one of its files."""
        aside = self._folder / f".removed-{os.getpid()}-{next(self._numbers)}"
        try:
            folder.rename(aside)
            shutil.rmtree(aside)
        except OSError as e:
            log.warning("%s cannot be removed: %s", folder, e)

    def _clean(self) -> None:
        for entry in self._folder.iterdir():
            if entry.name.startswith(".replaced-"):
                final = self._folder / entry.name.removeprefix(".replaced-")
                shutil.rmtree(entry) if final.exists() else entry.rename(final)
            elif entry.name.startswith((".writing-", ".removed-")):
                shutil.rmtree(entry)

    def _scan(self) -> None:
        for entry in sorted(e for e in self._folder.iterdir() if not e.name.startswith(_UNFINISHED)):
            try:
                manifest = self._examined(entry)
            except (ReplicaDiverged, OSError) as e:
                log.warning("%s is left out: %s", entry, e)
                continue
            self._manifests[Stored.of(manifest)] = manifest

    def _examined(self, entry: Path) -> Manifest:
        """Its chunks are verified when they are read. Raises ReplicaDiverged or OSError."""
        name = read_name(entry.name)
        if name is None:
            raise ReplicaDiverged("no snapshot has such a name")
        round_, digest = name
        with (entry / MANIFEST).open("rb") as file:
            encoded = file.read(max_manifest_bytes(MAX_CHUNKS * CHUNK_BYTES) + 1)
        if digest_of(encoded).hex() != digest:
            raise ReplicaDiverged("its manifest does not match the digest in its name")
        manifest = read_manifest(encoded, self._run_id)
        if manifest.round != round_:
            raise ReplicaDiverged(f"its manifest is of round {manifest.round}")
        n_bytes = (entry / DATA).stat().st_size
        if n_bytes != manifest.n_bytes:
            raise ReplicaDiverged(f"{DATA} has {n_bytes} bytes, not {manifest.n_bytes}")
        return manifest


def _through(digests: ChunkDigests, pieces: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    for piece in pieces:
        digests.update(piece)
        yield piece


def local_name(rank: int = 0, ranks: int = 1) -> str:
    """The file with a rank's local state: it can be used by the same rank of as many."""
    return LOCAL if ranks == 1 else f"{LOCAL}.{rank}-of-{ranks}"


def read_local(folder: Path, name: str) -> LocalState | None:
    """None: there is none. Raises BadLocalState and OSError."""
    try:
        return decode((folder / name).read_bytes())
    except FileNotFoundError:
        return None


def _keep_local(old: Path, new: Path) -> None:
    """The successor of a snapshot takes over the local state if it has none of its own."""
    if not any(new.glob(f"{LOCAL}*")):
        for path in old.glob(f"{LOCAL}*"):
            shutil.copy2(path, new / path.name)
