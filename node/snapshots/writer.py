"""Writes snapshots while training goes on: training waits for a copy of the tensors, not for the disk."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...coordinator.protocol.messages import Changes
from .format import Stored
from .local_state import LocalState
from .store import SnapshotStore

log = logging.getLogger("thinwire.node")


@dataclass(frozen=True, slots=True)
class _Job:
    """`aside`: a folder in which everything is already."""

    round: int
    commit: bytes
    fingerprint: bytes
    tensors: dict[str, Tensor] = field(default_factory=dict)
    local: LocalState | None = None
    aside: Path | None = None
    changes: Changes = ()


class SnapshotWriter:
    """One thread; one snapshot at a time. One more may wait: a newer one takes its place.

    `done` is called on that thread for every snapshot that is on disk. What goes wrong (a full disk) is
    logged, once until it has worked again, and training goes on. `failed` counts.
    """

    def __init__(self, store: SnapshotStore, done: Callable[[Stored], None]) -> None:
        self.store = store
        self._done = done
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._closed = False
        self._told: set[str] = set()
        self.failed = 0
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)
        self._thread.start()

    def take(
        self,
        tensors: Mapping[str, Tensor],
        *,
        round: int,
        commit: bytes,
        fingerprint: bytes,
        local: LocalState | None = None,
        changes: Changes = (),
    ) -> None:
        """Returns as soon as everything is copied to memory of the CPU. After `close` nothing happens."""
        if self._closed:
            return
        copies = {name: t.detach().to(torch.device("cpu"), copy=True) for name, t in tensors.items()}
        copied = None if local is None else local.copied()
        self._put(_Job(round, commit, fingerprint, copies, copied, changes=changes))

    def complete(
        self, aside: Path, *, round: int, commit: bytes, fingerprint: bytes, changes: Changes = ()
    ) -> None:
        """The same for one of which every rank has written its part (see `SnapshotStore.complete`)."""
        if self._closed:
            shutil.rmtree(aside, ignore_errors=True)
            return
        self._put(_Job(round, commit, fingerprint, aside=aside, changes=changes))

    def _put(self, job: _Job) -> None:
        with self._changed:
            if (old := self._waiting) is not None:
                if old.round != job.round:  # the last one comes twice
                    log.info("the snapshot of round %d was not written: a later one is ready", old.round)
                self._drop(old)
            self._waiting = job
            self._changed.notify_all()

    @staticmethod
    def _drop(job: _Job) -> None:
        if job.aside is not None:
            shutil.rmtree(job.aside, ignore_errors=True)

    def close(self, wait: bool = True) -> None:
        """`wait`: until what was taken is on disk. Otherwise what waits is dropped, and a snapshot that is
        being written goes on by itself if the process lives that long."""
        with self._changed:
            self._closed = True
            if not wait and self._waiting is not None:
                self._drop(self._waiting)
                self._waiting = None
            self._changed.notify_all()
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._write(job)
            del job  # its tensors: not kept until the next one comes

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            job, self._waiting = self._waiting, None
            return job

    def _write(self, job: _Job) -> None:
        try:
            stored = self._written(job)
            self._told.clear()
            self._done(stored)
        except Exception as e:  # noqa: BLE001 - whatever it was, training and later snapshots go on
            self.tell_failure(job.round, e)

    def tell_failure(self, round_: int, error: Exception) -> None:
        """Counts and logs it."""
        self.failed += 1
        cause = f"{type(error).__name__} {error.strerror if isinstance(error, OSError) else error}"
        if cause not in self._told:
            self._told.add(cause)
            log.warning("no snapshot of round %d (training goes on): %s", round_, error)

    def _written(self, job: _Job) -> Stored:
        if job.aside is None:
            return self.store.write(
                job.tensors,
                round=job.round,
                commit=job.commit,
                fingerprint=job.fingerprint,
                local=job.local,
                changes=job.changes,
            )
        return self.store.complete(
            job.aside,
            round=job.round,
            commit=job.commit,
            fingerprint=job.fingerprint,
            changes=job.changes,
        )
