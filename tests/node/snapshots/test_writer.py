"""The background writer: training waits for a copy of the tensors only, and outlives what goes wrong."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from thinwire.node.snapshots.format import Stored
from thinwire.node.snapshots.local_state import LocalState
from thinwire.node.snapshots.store import SnapshotStore
from thinwire.node.snapshots.writer import SnapshotWriter

RUN = bytes(range(32))


def tensors(value: int) -> dict[str, Tensor]:
    return {"b": torch.arange(100_000, dtype=torch.float32) + value, "a": torch.tensor([[float(value)]])}


def take(writer: SnapshotWriter, round: int) -> None:
    writer.take(tensors(round), round=round, commit=bytes(32), fingerprint=bytes(8))


def rounds(store: SnapshotStore) -> list[int]:
    return [stored.round for stored in store.stored()]


def test_the_writer_copies_at_once_and_tells_when_it_is_on_disk(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN)
    done: list[tuple[Stored, bool]] = []
    writer = SnapshotWriter(
        store, lambda s: done.append((s, threading.current_thread() is threading.main_thread()))
    )
    x = tensors(1)
    momentum = torch.ones(2)
    writer.take(
        x,
        round=1,
        commit=bytes([1]) * 32,
        fingerprint=bytes(8),
        local=LocalState(1, {"momentum": momentum}),
    )
    for t in (*x.values(), momentum):
        t.zero_()  # training goes on
    writer.close()
    assert done == [(store.stored()[0], False)]
    _, found = store.load(store.stored()[0])
    assert all(torch.equal(found[name], t) for name, t in tensors(1).items())
    local = store.local(store.stored()[0])
    assert local is not None
    assert torch.equal(local.strategy["momentum"], torch.ones(2))
    take(writer, 2)
    assert rounds(store) == [1]


def test_of_those_that_wait_only_the_newest_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = SnapshotStore(tmp_path, RUN, keep=10)
    writing, go_on = threading.Event(), threading.Event()

    def done(stored: Stored) -> None:
        writing.set()
        assert go_on.wait(60)

    writer = SnapshotWriter(store, done)
    for r in (1, 2, 3, 4, 5, 5):
        take(writer, r)
        assert writing.wait(60)  # the first one is on disk, and its thread is held up
    go_on.set()
    writer.close()
    assert rounds(store) == [1, 5]
    assert [f"of round {r} was not written" in caplog.text for r in (4, 5)] == [True, False]


def test_without_waiting_the_waiting_one_is_dropped(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, RUN)
    writing, go_on = threading.Event(), threading.Event()

    def done(stored: Stored) -> None:
        writing.set()
        assert go_on.wait(60)

    writer = SnapshotWriter(store, done)
    take(writer, 1)
    assert writing.wait(60)
    take(writer, 2)
    writer.close(wait=False)
    go_on.set()
    writer.close()
    assert rounds(store) == [1]


def test_what_goes_wrong_is_told_once_until_it_works_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "snapshots"
    store = SnapshotStore(folder, RUN)
    settled = threading.Semaphore(0)
    writer = SnapshotWriter(store, lambda stored: settled.release())

    def settle(round: int) -> None:
        failed = writer.failed
        take(writer, round)
        deadline_s = time.monotonic() + 60
        while writer.failed == failed and not settled.acquire(timeout=0.01):
            assert time.monotonic() < deadline_s

    away = tmp_path / "away"
    for first in (1, 4):
        folder.rename(away)  # a disk that is gone
        settle(first)
        settle(first + 1)
        away.rename(folder)
        settle(first + 2)
    writer.close()
    assert writer.failed == 4
    assert rounds(store) == [3, 6]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("training goes on): FileNotFoundError" in w or "No such file" in w for w in warnings)
