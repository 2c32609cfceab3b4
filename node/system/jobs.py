"""Calls on many cores: each in a process of its own with one thread, so that what it returns is the same as
here. What asks for calls is a generator, which goes on when all that it asked for is there.

Processes end when this one does, however it ends, and at the end of `work_off`, whatever they do then.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, Final, TypeVar

from ...compression.errors import ThinwireError
from .stopping import stop_on_signals

R = TypeVar("R")

POLL_S: Final = 0.2

THREADS: Final[Mapping[str, str]] = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)


@dataclass(frozen=True, slots=True)
class Call:
    """A function of a module, and arguments for it, that another process can be sent."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()

    def done(self) -> Done:
        started_s = time.process_time()
        result = self.function(*self.args)
        return Done(self, result, time.process_time() - started_s)


@dataclass(frozen=True, slots=True)
class Done:
    """A call, what it returned, and the CPU time that it took."""

    call: Call
    result: Any
    cpu_s: float


Work = Generator[Sequence[Call], list[Any], R]
"""Yields calls, is sent what they returned, in their order, and so on; returns what it is for."""

Rows = Generator[R, None, None]
Tell = Callable[[Done], object]
Start = Callable[[Call], "Future[Done]"]


def n_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Of torch's: where tensors are small, and other threads or processes have the other cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work_off(
    works: Sequence[Work[R]],
    n_jobs: int,
    tell: Tell = lambda _done: None,
    preload: Sequence[str] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> Rows[tuple[int, R]]:
    """The number and result of each work, in the order in which they end. Of calls that are equal one is
    made; those of the first works come first. `n_jobs`: as many at a time, 1: all in this process.
    `preload`: modules that processes begin with. Ends early when `stopped`: what a call then returns goes
    nowhere. Raises what a call raises, and ThinwireError if a process is ended from outside."""
    board, running = _Board(works), set[Future[Done]]()
    with _here() if n_jobs == 1 else _processes(n_jobs, preload) as start:
        while board.waiting:
            for job in islice(board.new(), n_jobs - len(running)):
                job.future = start(job.call)
                running.add(job.future)
            done, running = wait(running, POLL_S, return_when=FIRST_COMPLETED)
            if stopped():
                return
            for future in done:
                tell(_of(future))
            yield from board.advance()


def _of(future: Future[Done]) -> Done:
    try:
        return future.result()
    except BrokenProcessPool as e:
        raise ThinwireError("one of the processes was killed (out of memory? take fewer, with --jobs)") from e


def until_stopped(rows: Rows[R], each: Callable[[R], object]) -> int:
    """Calls `each` with every row, until there is none left or the first Ctrl-C, SIGTERM or SIGHUP. Returns
    the exit code of that signal, or 0."""
    with stop_on_signals() as stop:
        stop.on_stop.append(_interrupt)
        try:
            for row in rows:
                each(row)
        except KeyboardInterrupt:
            if not stop.signal:
                raise
        finally:
            rows.close()
    return 128 + stop.signal if stop.signal else 0


def _interrupt() -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------- who waits


@dataclass(slots=True)
class _Job:
    call: Call
    future: Future[Done] | None = None


class _Board:
    """What each work waits for."""

    def __init__(self, works: Sequence[Work[Any]]) -> None:
        self._works, self._jobs = works, list[_Job]()
        self.waiting = {number: self._jobs_of(next(work)) for number, work in enumerate(works)}

    def new(self) -> Iterator[_Job]:
        """What is not begun, the first works' first."""
        return (job for number in sorted(self.waiting) for job in self.waiting[number] if job.future is None)

    def advance(self) -> Iterator[tuple[int, Any]]:
        """Those that have all that they wait for go on. Those that end."""
        for number in sorted(self.waiting):
            while (results := _results(self.waiting[number])) is not None:
                try:
                    self.waiting[number] = self._jobs_of(self._works[number].send(results))
                except StopIteration as end:
                    del self.waiting[number]
                    yield number, end.value
                    break

    def _jobs_of(self, calls: Sequence[Call]) -> list[_Job]:
        return [self._job(call) for call in calls]

    def _job(self, call: Call) -> _Job:
        for job in self._jobs:
            if job.call == call:
                return job
        self._jobs.append(_Job(call))
        return self._jobs[-1]


def _results(jobs: Sequence[_Job]) -> list[Any] | None:
    """None: not all are there."""
    found = [job.future.result().result for job in jobs if job.future is not None and job.future.done()]
    return found if len(found) == len(jobs) else None


# ------------------------------------------------------------------------------------------- where it runs


@contextmanager
def _here() -> Iterator[Start]:
    def start(call: Call) -> Future[Done]:
        future: Future[Done] = Future()
        future.set_result(call.done())
        return future

    with one_thread():
        yield start


@contextmanager
def _processes(n: int, preload: Sequence[str]) -> Iterator[Start]:
    """Forked from one that has loaded `preload` and has no threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    alive, end = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="thinwire-jobs-") as folder, _environment(THREADS):
        executor = ProcessPoolExecutor(n, context, _begin, (alive, folder))
        try:
            yield lambda call: executor.submit(call.done)
        finally:
            end.close()
            executor.shutdown(cancel_futures=True)
            alive.close()


def _begin(alive: Connection, folder: str) -> None:
    """In a process: Ctrl-C is the parent's affair, and when that has closed the other end, or is gone, this
    one is, too; what it has written to its temporary folder goes with the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tempfile.tempdir = folder

    def watch() -> None:
        wait_for([alive])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """For processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
