"""Downloads from several holders: slow, dead and lying ones cost little, and nothing wrong is kept."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compression.errors import SwarmUnreachable
from thinwire.node.links.base import Lied
from thinwire.node.snapshots.chunk_schedule import (
    AT_ONCE,
    MAX_REST_S,
    MOST_AT_ONCE,
    PATIENCE_S,
    ChunkSchedule,
)
from thinwire.node.snapshots.download import Get, NoHolder, Progress, download
from thinwire.node.snapshots.format import CHUNK_BYTES, Stored
from thinwire.node.snapshots.store import SnapshotStore

RUN = bytes(range(32))
N_CHUNKS = 8
WAIT_S = 60.0


@dataclass
class Swarm:
    """Holders of one snapshot, which is on disk; `scripts` say what some of them do instead of giving it."""

    store: SnapshotStore
    stored: Stored
    holders: list[str]
    scripts: dict[str, Callable[[int, bytes], bytes]] = field(default_factory=dict)
    asked: list[tuple[int, str]] = field(default_factory=list)
    at_work: Counter[str] = field(default_factory=Counter)
    most_at_work: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, i: int, digest: bytes, holder: str) -> bytes:
        with self.lock:
            self.asked.append((i, holder))
            self.at_work[holder] += 1
            self.most_at_work[holder] = max(self.most_at_work[holder], self.at_work[holder])
        try:
            chunk = self.store.open(digest)[0].read()
            script = self.scripts.get(holder)
            return chunk if script is None else script(i, chunk)
        finally:
            with self.lock:
                self.at_work[holder] -= 1

    def manifest(self) -> bytes:
        return self.store.open(self.stored.manifest)[0].read()

    def times_asked(self) -> list[int]:
        """For each chunk."""
        times = Counter(i for i, _ in self.asked)
        return [times[i] for i in range(N_CHUNKS)]


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> tuple[SnapshotStore, Stored]:
    store = SnapshotStore(tmp_path_factory.mktemp("donor"), RUN)
    x = torch.arange((N_CHUNKS - 1) * CHUNK_BYTES // 4 + 100, dtype=torch.float32)
    return store, store.write({"x": x}, round=50, commit=bytes(32), fingerprint=bytes(8))


@pytest.fixture
def swarm(donor: tuple[SnapshotStore, Stored]) -> Swarm:
    return Swarm(*donor, holders=["a", "b", "c"])


@dataclass
class Joiner:
    """A node that downloads; `told`: its progress."""

    swarm: Swarm
    store: SnapshotStore
    told: list[Progress] = field(default_factory=list)
    seed: int = 1
    patience_s: float = PATIENCE_S

    def run(self, get: Get | None = None, stopped: Callable[[], bool] = lambda: False) -> None:
        self.incoming = self.store.incoming(self.swarm.manifest())
        download(
            self.incoming,
            lambda: list(self.swarm.holders),
            get or self.swarm.get,
            self.told.append,
            stopped,
            seed=self.seed,
            patience_s=self.patience_s,
        )

    def finish(self) -> None:
        """What arrived is what the holders have."""
        stored = self.incoming.finish()
        assert stored == self.swarm.stored
        assert torch.equal(self.store.load(stored)[1]["x"], self.swarm.store.load(stored)[1]["x"])


@pytest.fixture
def joiner(swarm: Swarm, tmp_path: Path) -> Joiner:
    return Joiner(swarm, SnapshotStore(tmp_path / "joiner", RUN))


def test_every_chunk_is_asked_for_once_and_of_every_holder_one_at_a_time(
    swarm: Swarm, joiner: Joiner
) -> None:
    together = threading.Barrier(3)
    met: set[str] = set()

    def meet(holder: str) -> Callable[[int, bytes], bytes]:
        def script(i: int, chunk: bytes) -> bytes:
            if holder not in met:
                met.add(holder)
                together.wait(WAIT_S)  # all three are at work at the same time, or this breaks
            return chunk

        return script

    swarm.scripts = {name: meet(name) for name in swarm.holders}
    joiner.run()
    joiner.finish()
    assert swarm.times_asked() == [1] * N_CHUNKS
    assert swarm.most_at_work == dict.fromkeys("abc", 1)
    n_bytes = [p.n_bytes for p in joiner.told]
    assert n_bytes == sorted(n_bytes)
    last = joiner.told[-1]
    assert last.n_bytes == last.total_bytes == joiner.incoming.manifest.n_bytes
    assert (last.twice_bytes, last.n_lies, last.holders) == (0, 0, ())
    assert last.rate_bytes_per_s > 0
    assert any(len(p.holders) > 1 for p in joiner.told)


def test_a_holder_that_dies_half_way_costs_one_chunk(swarm: Swarm, joiner: Joiner) -> None:
    swarm.holders = ["a", "b"]
    dead = threading.Event()

    def die(i: int, chunk: bytes) -> bytes:
        if len(swarm.asked) > N_CHUNKS // 2:
            dead.set()
        if dead.is_set():
            raise SwarmUnreachable("the connection was cut")
        return chunk

    def outlive(i: int, chunk: bytes) -> bytes:
        # The second half begins with the other one's death.
        if len(swarm.asked) > N_CHUNKS // 2:
            assert dead.wait(WAIT_S)
            swarm.holders = ["b"]
        return chunk

    swarm.scripts = {"a": die, "b": outlive}
    joiner.run()
    joiner.finish()
    assert dead.is_set()
    assert sum(swarm.times_asked()) == N_CHUNKS + 1
    assert max(swarm.times_asked()) == 2
    assert joiner.told[-1].twice_bytes == 0


def test_after_a_cut_only_what_is_missing_is_asked_for(swarm: Swarm, joiner: Joiner, tmp_path: Path) -> None:
    swarm.holders = ["a"]
    joiner.run(stopped=lambda: len(swarm.asked) >= 4)
    n_here = N_CHUNKS - len(joiner.incoming.missing)
    assert 0 < n_here < N_CHUNKS
    before = len(swarm.asked)
    n_told = len(joiner.told)
    joiner.store = SnapshotStore(tmp_path / "joiner", RUN)  # a restart
    joiner.run()
    joiner.finish()
    assert len(swarm.asked) - before == N_CHUNKS - n_here
    assert joiner.told[n_told].n_bytes >= n_here * CHUNK_BYTES - CHUNK_BYTES


def test_a_lying_holder_is_not_asked_again_and_the_chunk_is_named(
    swarm: Swarm, joiner: Joiner, caplog: pytest.LogCaptureFixture
) -> None:
    def corrupt(i: int, chunk: bytes) -> bytes:
        return bytes([chunk[0] ^ 1]) + chunk[1:]

    def noticed_by_the_link(i: int, chunk: bytes) -> bytes:
        raise Lied("the bytes do not fit their digest")

    honest_may = threading.Event()

    def honest(i: int, chunk: bytes) -> bytes:
        assert honest_may.wait(WAIT_S)
        return chunk

    swarm.scripts = {"a": corrupt, "b": noticed_by_the_link, "c": honest}

    def tell(progress: Progress) -> None:
        joiner.told.append(progress)
        if progress.n_lies == 2:
            honest_may.set()

    incoming = joiner.incoming = joiner.store.incoming(swarm.manifest())
    with caplog.at_level(logging.WARNING):
        download(incoming, lambda: swarm.holders, swarm.get, tell, lambda: False, seed=1)
    joiner.finish()
    lies = [(i, holder) for i, holder in swarm.asked if holder != "c"]
    assert sorted(holder for _, holder in lies) == ["a", "b"]
    for i, holder in lies:
        assert f"{holder} gave wrong bytes for chunk {i} of the snapshot of round 50" in caplog.text
    assert joiner.told[-1].n_lies == 2
    assert len(swarm.asked) == N_CHUNKS + 2


def test_a_stalled_holder_holds_nothing_up(swarm: Swarm, joiner: Joiner) -> None:
    asked, over = threading.Event(), threading.Event()

    def stall(i: int, chunk: bytes) -> bytes:
        asked.set()
        assert over.wait(WAIT_S)
        return chunk

    def after_it(i: int, chunk: bytes) -> bytes:
        assert asked.wait(WAIT_S)
        return chunk

    swarm.scripts = {"a": after_it, "b": stall, "c": after_it}
    joiner.run()
    joiner.finish()
    over.set()
    (stalled,) = [i for i, holder in swarm.asked if holder == "b"]
    assert swarm.times_asked() == [2 if i == stalled else 1 for i in range(N_CHUNKS)]


def test_a_holder_that_appears_joins_in_and_one_that_recovers_is_asked_again(
    swarm: Swarm, joiner: Joiner
) -> None:
    swarm.holders = ["a"]
    appeared = threading.Event()

    def wait_for_b(i: int, chunk: bytes) -> bytes:
        if len(swarm.asked) == 1:
            raise SwarmUnreachable("not now")
        swarm.holders = ["a", "b"]
        assert appeared.wait(WAIT_S)
        return chunk

    def appear(i: int, chunk: bytes) -> bytes:
        appeared.set()
        return chunk

    swarm.scripts = {"a": wait_for_b, "b": appear}
    joiner.run()
    joiner.finish()
    assert {holder for _, holder in swarm.asked} == {"a", "b"}
    assert len(swarm.asked) == N_CHUNKS + 1


def test_without_holders_it_gives_up_and_keeps_what_came(swarm: Swarm, joiner: Joiner) -> None:
    joiner.patience_s = 0.3
    swarm.holders = ["a"]

    def leave(i: int, chunk: bytes) -> bytes:
        if len(swarm.asked) == 3:
            swarm.holders = []
            raise SwarmUnreachable("gone")
        return chunk

    swarm.scripts = {"a": leave}
    with pytest.raises(NoHolder, match=r"round 50 for .* bytes are here and are kept"):
        joiner.run()
    assert len(joiner.incoming.missing) == N_CHUNKS - 2
    assert len(joiner.store.incoming(swarm.manifest()).missing) == N_CHUNKS - 2


def test_it_stops_while_everybody_is_silent(swarm: Swarm, joiner: Joiner) -> None:
    over, stop = threading.Event(), threading.Event()

    def stall(i: int, chunk: bytes) -> bytes:
        stop.set()
        assert over.wait(WAIT_S)
        return chunk

    swarm.scripts = dict.fromkeys(swarm.holders, stall)
    joiner.run(stopped=stop.is_set)
    over.set()
    assert len(joiner.incoming.missing) == N_CHUNKS


def test_what_nobody_expects_is_raised(swarm: Swarm, joiner: Joiner) -> None:
    def get(i: int, digest: bytes, holder: str) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        joiner.run(get)

    def lose_the_folder(i: int, chunk: bytes) -> bytes:
        joiner.store.give_up_incoming()
        return chunk

    swarm.scripts = dict.fromkeys(swarm.holders, lose_the_folder)
    with pytest.raises(FileNotFoundError):
        joiner.run()


# --------------------------------------------------------------------------------------- the schedule alone


def schedule(n_chunks: int = 8, seed: int = 1) -> ChunkSchedule:
    return ChunkSchedule(range(n_chunks), seed, 0.0)


def test_joiners_begin_with_different_chunks() -> None:
    orders = set()
    for seed in range(10):
        s = schedule(100, seed)
        orders.add(tuple(s.assign(["a", "b", "c"], 0.0)))
        assert s.assign(["a", "b", "c"], 0.0) == []
    assert len(orders) == 10


def test_an_overdue_chunk_is_asked_of_another_holder_when_nothing_else_is_left() -> None:
    s = schedule(6)
    ((slow, _),) = s.assign(["slow"], 0.0)
    now_s = 0.0
    for _ in range(5):  # 5 s each: median 5, MAD 0
        ((chunk, _),) = s.assign(["slow", "a"], now_s)
        assert chunk != slow
        now_s += 5.0
        assert s.arrived(chunk, "a", now_s)
    now_s = 4.9  # the schedule believes the clock that it is given: the slow one is not overdue yet
    assert s.assign(["slow", "a"], now_s) == []
    assert s.assign(["slow", "a"], 5.1) == [(slow, "a")]
    assert s.assign(["slow", "a", "b"], 10.0) == []
    assert s.assign(["slow", "a", "b"], 10.2) == [(slow, "b")]  # the second one is overdue, too
    assert s.arrived(slow, "b", 11.0)
    assert s.is_done
    assert not s.arrived(slow, "slow", 12.0)


def test_a_hedged_chunk_that_one_holder_fails_stays_with_the_other() -> None:
    s = schedule(1)
    assert s.assign(["a"], 0.0) == [(0, "a")]
    assert s.assign(["a", "b"], 9.0) == []
    assert s.assign(["a", "b"], 11.0) == [(0, "b")]
    s.failed(0, "a", 12.0, lied=False)
    assert s.assign(["a", "b", "c"], 12.5) == []
    s.failed(0, "b", 13.0, lied=True)
    assert s.assign(["b", "c"], 13.0) == [(0, "c")]


def test_holders_rest_longer_each_time_and_liars_for_good() -> None:
    s = schedule(1)
    now_s, rests = 0.0, []
    for _ in range(8):
        assert s.assign(["a"], now_s) == [(0, "a")]
        s.failed(0, "a", now_s, lied=False)
        began_s = now_s
        while not s.assign(["a"], now_s):
            now_s += 0.25
        rests.append(now_s - began_s)
        s.failed(0, "a", now_s, lied=False)
        now_s += MAX_REST_S
    assert rests[0] == 1.0
    assert rests == sorted(rests)
    assert rests[-1] == MAX_REST_S
    s.assign(["a"], now_s)
    s.failed(0, "a", now_s, lied=True)
    assert s.assign(["a"], now_s + 10_000) == []
    assert s.n_lies == 1


def test_it_is_hopeless_without_holders_or_with_useless_ones_but_never_while_one_works() -> None:
    s = schedule()
    assert not s.is_hopeless(PATIENCE_S)
    assert s.is_hopeless(PATIENCE_S + 0.1)
    under_way = s.assign(["new"], 100.0)
    assert not s.is_hopeless(1000.0)
    now_s = 1000.0
    while not s.is_hopeless(now_s):  # it fails again and again
        for chunk, name in under_way or s.assign(["new"], now_s):
            s.failed(chunk, name, now_s, lied=False)
        under_way = []
        now_s += 0.5
        assert now_s < 1000.0 + 2 * PATIENCE_S
    assert now_s > 1000.0 + PATIENCE_S


def test_thin_links_make_it_patient() -> None:
    s = schedule()
    for i in range(4):
        ((chunk, _),) = s.assign(["a"], 40.0 * i)
        s.arrived(chunk, "a", 40.0 * (i + 1))
    assert not s.is_hopeless(160.0 + PATIENCE_S + 39)
    assert s.is_hopeless(160.0 + PATIENCE_S + 41)


def test_the_number_at_work_is_bounded_and_stalled_ones_keep_nobody_from_working() -> None:
    s = schedule(1000)
    names = [f"holder {i}" for i in range(100)]
    assert len(s.assign(names, 0.0)) == AT_ONCE
    assert s.assign(names, 1.0) == []
    n_busy = AT_ONCE
    for now_s in (20.0, 40.0, 60.0, 80.0, 100.0):  # all of them stall
        n_busy += len(s.assign(names, now_s))
    assert n_busy == MOST_AT_ONCE


@given(
    n_chunks=st.integers(1, 20),
    seed=st.integers(0, 5),
    steps=st.lists(
        st.tuples(st.sampled_from(["give", "give", "fail", "wait"]), st.integers(0, 9)), max_size=150
    ),
)
def test_no_chunk_is_ever_lost(n_chunks: int, seed: int, steps: list[tuple[str, int]]) -> None:
    s = schedule(n_chunks, seed)
    names = ["a", "b", "c", "d"]
    under_way: list[tuple[int, str]] = []
    here: set[int] = set()
    now_s = 0.0

    def give(k: int) -> None:
        chunk, name = under_way.pop(k % len(under_way))
        assert s.arrived(chunk, name, now_s) == (chunk not in here)
        here.add(chunk)

    for what, k in steps:
        started = s.assign(names, now_s)
        assert not {chunk for chunk, _ in started} & here
        under_way += started
        assert sorted(s.busy) == sorted(name for _, name in under_way)
        if what == "wait" or not under_way:
            now_s += 1.7
        elif what == "give":
            give(k)
        else:
            chunk, name = under_way.pop(k % len(under_way))
            s.failed(chunk, name, now_s, lied=False)
    while not s.is_done:  # whatever has happened, willing holders bring the rest
        now_s += MAX_REST_S
        under_way += s.assign(names, now_s)
        give(0)
    assert here == set(range(n_chunks))
