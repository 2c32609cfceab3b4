"""Downloads a snapshot chunk by chunk from several holders at once; knows no network.

Every fetch has a thread of its own, which only waits for the bytes. Whatever they bring is looked at, written
and counted in the caller's thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ...compression.errors import ReplicaDiverged, SwarmUnreachable
from ..links.base import Lied
from .chunk_schedule import PATIENCE_S, ChunkSchedule
from .incoming import Incoming

log = logging.getLogger("thinwire.node")

Get = Callable[[int, bytes, str], bytes]
"""(chunk, its digest, holder's peer id) -> its bytes. Blocks; raises SwarmUnreachable, or Lied."""

TICK_S: Final = 0.25
RATE_CHUNKS: Final = 32
"""The rate is that of so many of the last chunks."""


class NoHolder(SwarmUnreachable):
    """For a long time nobody has been there to give the missing chunks; those that came are kept."""


@dataclass(frozen=True, slots=True)
class Progress:
    """`n_bytes` of `total_bytes` are here, those of an earlier attempt included; `twice_bytes` came although
    they were here already; `n_lies`: chunks with wrong bytes."""

    n_bytes: int
    total_bytes: int
    rate_bytes_per_s: float
    holders: tuple[str, ...]
    twice_bytes: int
    n_lies: int


@dataclass(frozen=True, slots=True)
class _Answer:
    chunk: int
    holder: str
    result: bytes | Exception


def download(
    incoming: Incoming,
    holders: Callable[[], Sequence[str]],
    get: Get,
    progress: Callable[[Progress], None],
    stopped: Callable[[], bool],
    *,
    seed: int,
    patience_s: float = PATIENCE_S,
) -> None:
    """Returns when no chunk is missing, or soon after `stopped()`. `seed`: the peer's own, for the order.

    `holders` is asked again and again: those that appear join in. `progress` is told at every chunk and at
    least every `TICK_S`. Raises NoHolder after `patience_s` without hope; OSError (a full disk).
    """
    _Download(incoming, get, seed, patience_s).run(holders, progress, stopped)


class _Download:
    def __init__(self, incoming: Incoming, get: Get, seed: int, patience_s: float) -> None:
        self._incoming, self._get = incoming, get
        self._manifest = incoming.manifest
        missing = incoming.missing
        self._schedule = ChunkSchedule(missing, seed, time.monotonic(), patience_s)
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._n_bytes = self._manifest.n_bytes - sum(map(self._manifest.chunk_bytes, missing))
        self._twice_bytes = 0
        self._arrivals = deque([(time.monotonic(), self._n_bytes)], maxlen=RATE_CHUNKS)

    def run(
        self,
        holders: Callable[[], Sequence[str]],
        progress: Callable[[Progress], None],
        stopped: Callable[[], bool],
    ) -> None:
        while not self._schedule.is_done and not stopped():
            for chunk, holder in self._schedule.assign(holders(), time.monotonic()):
                threading.Thread(
                    target=self._fetch, args=(chunk, holder), name=f"chunk {chunk}", daemon=True
                ).start()
            try:
                self._handle(self._answers.get(timeout=TICK_S))
            except queue.Empty:
                self._refuse_hopeless()
            progress(self._progress())

    def _fetch(self, chunk: int, holder: str) -> None:
        try:
            result: bytes | Exception = self._get(chunk, self._manifest.chunks[chunk], holder)
        except Exception as e:  # noqa: BLE001 - the caller's thread raises what it cannot answer
            result = e
        self._answers.put(_Answer(chunk, holder, result))

    def _handle(self, answer: _Answer) -> None:
        if isinstance(answer.result, bytes):
            self._take(answer, answer.result)
        elif isinstance(answer.result, SwarmUnreachable):
            self._failed(answer, answer.result, lied=isinstance(answer.result, Lied))
        else:
            raise answer.result

    def _take(self, answer: _Answer, data: bytes) -> None:
        now_s = time.monotonic()
        try:
            self._incoming.put(answer.chunk, data)
        except ReplicaDiverged as e:
            self._failed(answer, e, lied=True)
            return
        if self._schedule.arrived(answer.chunk, answer.holder, now_s):
            self._n_bytes += len(data)
            self._arrivals.append((now_s, self._n_bytes))
        else:
            self._twice_bytes += len(data)

    def _failed(self, answer: _Answer, error: Exception, lied: bool) -> None:
        self._schedule.failed(answer.chunk, answer.holder, time.monotonic(), lied)
        if lied:
            log.warning(
                "%s gave wrong bytes for chunk %d of the snapshot of round %d and is not asked again: %s",
                answer.holder,
                answer.chunk,
                self._manifest.round,
                error,
            )
        else:
            log.info("chunk %d did not come from %s: %s", answer.chunk, answer.holder, error)

    def _refuse_hopeless(self) -> None:
        now_s = time.monotonic()
        if self._schedule.is_hopeless(now_s):
            raise NoHolder(
                f"nobody has given a chunk of the snapshot of round {self._manifest.round} "
                f"for {self._schedule.hopeless_s(now_s):.0f} s; {self._n_bytes} of {self._manifest.n_bytes} "
                f"bytes are here and are kept"
            )

    def _progress(self) -> Progress:
        (first_s, first_bytes), (_, last_bytes) = self._arrivals[0], self._arrivals[-1]
        return Progress(
            n_bytes=self._n_bytes,
            total_bytes=self._manifest.n_bytes,
            rate_bytes_per_s=(last_bytes - first_bytes) / max(time.monotonic() - first_s, 1e-6),
            holders=tuple(self._schedule.busy),
            twice_bytes=self._twice_bytes,
            n_lies=self._schedule.n_lies,
        )
