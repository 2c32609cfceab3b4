"""The disk that a node's or a coordinator's state will be on: room, speed, and what a commit costs."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

import psutil

from ..units import human_bytes
from .findings import Finding, Stopped, failed, ok, warning

WRITTEN_BYTES = 64 * 2**20
NO_ROOM_BYTES = 2 * WRITTEN_BYTES
LITTLE_ROOM_BYTES = 2 * 10**9
SLOW_BYTES_PER_S = 20 * 10**6
SLOW_COMMIT_S = 0.05

_WRITE_S = 2.5
_COMMIT_S = 1.5
_COMMITS = 30
_PIECE_BYTES = 4 * 2**20
_PREFIX = ".thinwire-doctor-"
_STALE_S = 3600.0
_ELSEWHERE = "name a folder on another disk with --state"
_NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gluster", "beegfs", "fuse.sshfs", "gpfs")


def check_disk(folder: Path, stopped: Stopped) -> Iterator[Finding]:
    """`folder` need not be there yet: then its nearest parent is looked at. Nothing is left behind."""
    try:
        place = nearest(folder)
        room = _room(folder, place)
        yield room
        if room.status == "failed":
            return
        yield _kind(place)
        _remove_stale(place)
        yield _speed(place, stopped)
        if not stopped():
            yield _commits(place)
    except sqlite3.Error as e:
        yield failed("commits", f"SQLite cannot work below {folder}: {e}", _ELSEWHERE, folder=str(folder))
    except OSError as e:
        yield failed("disk", f"{folder} cannot be written: {e.strerror or e}", _ELSEWHERE, folder=str(folder))


def nearest(folder: Path) -> Path:
    """The folder, or the first of its parents that is there. Raises NotADirectoryError for a file."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(0, f"{place} is not a folder")
    return place


def _room(folder: Path, place: Path) -> Finding:
    usage, files = shutil.disk_usage(place), os.statvfs(place)
    if usage.total == 0:
        raise OSError(0, f"{place} is on no disk")
    figures = {"folder": str(folder), "free_bytes": usage.free, "total_bytes": usage.total}
    detail = f"{human_bytes(usage.free)} free for {folder}"
    if usage.free < NO_ROOM_BYTES or (files.f_files > 0 and files.f_favail == 0):
        what = detail if usage.free < NO_ROOM_BYTES else f"no more files can be made below {place}"
        return failed("disk space", f"{what}: the disk is full", f"make room, or {_ELSEWHERE}", **figures)
    if usage.free < LITTLE_ROOM_BYTES:
        remedy = (
            f"nodes keep three snapshots, coordinators up to 20 GB of payloads: make room, or {_ELSEWHERE}"
        )
        return warning("disk space", detail, remedy, **figures)
    return ok("disk space", detail, **figures)


def _kind(place: Path) -> Finding:
    kind = _file_system(place)
    if kind in ("tmpfs", "ramfs"):
        remedy = f"all is lost with the next start of the machine: {_ELSEWHERE}"
        return warning("file system", f"{kind}: kept in memory", remedy, type=kind)
    if kind == "overlay":
        remedy = "all is lost with the container: give it a volume, and name that with --state"
        return warning("file system", f"{kind}: a container's own layer", remedy, type=kind)
    if kind.startswith(_NETWORK):
        remedy = f"a ledger in SQLite is not safe on a network file system: {_ELSEWHERE}"
        return warning("file system", f"{kind}: on the network", remedy, type=kind)
    return ok("file system", kind or "unknown", type=kind)


def _file_system(place: Path) -> str:
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    real = place.resolve()
    return next((mounts[p] for p in (real, *real.parents) if p in mounts), "")


def _speed(place: Path, stopped: Stopped) -> Finding:
    """In pieces, each forced to the disk, so that a slow one is known after a few of them."""
    piece = os.urandom(_PIECE_BYTES)
    n_bytes, begun_s = 0, time.perf_counter()
    with tempfile.TemporaryFile(dir=place, prefix=_PREFIX, buffering=0) as file:  # it has no name
        while n_bytes < WRITTEN_BYTES and time.perf_counter() - begun_s < _WRITE_S and not stopped():
            n_bytes += file.write(piece)
            os.fsync(file.fileno())
    rate = n_bytes / (time.perf_counter() - begun_s)
    detail, figures = f"{human_bytes(rate)}/s written and synced", {"write_bytes_per_s": round(rate)}
    if n_bytes and rate < SLOW_BYTES_PER_S:
        return warning("disk speed", detail, f"snapshots of large models take long: {_ELSEWHERE}", **figures)
    return ok("disk speed", detail, **figures)


def _commits(place: Path) -> Finding:
    """What a round costs a coordinator: the same journal and the same safety as its ledger's."""
    taken_s: list[float] = []
    with (
        tempfile.TemporaryDirectory(dir=place, prefix=_PREFIX) as folder,
        closing(sqlite3.connect(Path(folder) / "ledger.db")) as db,
    ):
        mode = str(db.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE record (round INTEGER PRIMARY KEY, record BLOB NOT NULL)")
        until_s = time.perf_counter() + _COMMIT_S
        while len(taken_s) < _COMMITS and time.perf_counter() < until_s:
            begun_s = time.perf_counter()
            with db:
                db.execute("INSERT INTO record (record) VALUES (?)", (os.urandom(600),))
            taken_s.append(time.perf_counter() - begun_s)
    typical_s = median(taken_s)
    detail, figures = f"{typical_s * 1000:.1f} ms to the disk", {"commit_s": round(typical_s, 6)}
    if mode != "wal":
        remedy = f"this file system cannot hold a coordinator's ledger: {_ELSEWHERE}"
        return failed("commits", f"SQLite has no write-ahead log here ({mode})", remedy, **figures)
    if typical_s > SLOW_COMMIT_S:
        remedy = f"every round of a coordinator here waits for that: {_ELSEWHERE}; nodes do not mind"
        return warning("commits", detail, remedy, **figures)
    return ok("commits", detail, **figures)


def _remove_stale(place: Path) -> None:
    """What one that was killed has left."""
    for old in place.glob(f"{_PREFIX}*"):
        if old.is_dir() and time.time() - old.stat().st_mtime > _STALE_S:
            shutil.rmtree(old, ignore_errors=True)
