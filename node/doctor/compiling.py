"""The CPU kernels compiled once for this machine, so that no round of a run has to wait for that.

numba compiles a kernel when it is first called, and keeps it on disk: about half a minute for all of them.
Nodes that start together on a new machine would each do it. `python -m thinwire.node.doctor.compiling` does
it on all cores, as `make setup` and `thinwire demo` do.
"""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Final

import torch

from ...optim.registry import build_strategy
from ..system.every import Every
from ..system.output import to_stderr
from .known_answers import KNOWN_ANSWERS
from .self_test import KERNELS, failed_kernels

LONGEST_WAIT_S: Final = 300.0
_MARK: Final = "thinwire-compiled"
_STEP: Final = "a step"


def is_compiled() -> bool:
    """Whether the kernels of this version lie compiled in numba's cache, or none are in use."""
    mark = _mark()
    if mark is None:
        return True
    try:
        return mark.read_text() == _stamp(mark.parent)
    except OSError:
        return False


@contextmanager
def compiling(say: Callable[[str], object]) -> Iterator[None]:
    """Around a self-test, which compiles what is not there yet: one process of a machine at a time does it,
    where its files can be locked and written.

    `say` is told, if there is anything to compile."""
    mark = _mark()
    if mark is None or is_compiled() or not os.access(mark.parent, os.W_OK):
        yield
        return
    say("compiling kernels for this machine: once, for half a minute or, on busy cores, a few")
    with ExitStack() as stack:
        with suppress(OSError):
            _wait_for(stack.enter_context(mark.open("a")))
        yield
        _step()
        with suppress(OSError):
            mark.write_text(_stamp(mark.parent))


def _wait_for(lock: IO[str]) -> None:
    """Until no other process has it, or is taken to hang: that must keep nobody out of a run. Raises
    OSError."""
    until_s = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < until_s:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)


def compile_kernels(say: Callable[[str], object], stopped: Callable[[], bool] = lambda: False) -> None:
    """Compiles what is not there yet, on all cores; until `stopped`."""
    if is_compiled():
        return
    names = [name for name, known in KNOWN_ANSWERS.items() if not known.is_slow]
    names = [*reversed(names), _STEP]  # what takes longest is among the last, and has to begin early
    with suppress(_Stopped), compiling(say):
        if is_compiled():  # by another process, meanwhile
            return
        with multiprocessing.get_context("spawn").Pool(initializer=_begin) as pool:
            every = Every(5.0)
            for n, _ in enumerate(pool.imap_unordered(_compile, names), 1):
                if stopped():
                    raise _Stopped
                if every.is_due():
                    say(f"{n} of {len(names)} groups of kernels are compiled")


class _Stopped(Exception):
    """Not everything is compiled."""


def _begin() -> None:
    """In a worker: Ctrl-C is the parent's affair, which ends it, and the cores are taken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _compile(name: str) -> None:
    if name == _STEP:
        _step()
    else:  # whether it is right, a node asks before it joins
        failed_kernels(torch.device("cpu"), names=[name])


def _step() -> None:
    """Kernels that take many small parameters in one call, which no known answer needs."""
    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    named = [(str(i), parameter) for i, parameter in enumerate(parameters)]
    optimizer = build_strategy({"name": "decoupled", "lr": 1e-3}, named)
    optimizer.step(lambda: torch.stack([p.square().sum() for p in parameters]).sum())


def _mark() -> Path | None:
    """Where it is noted what was compiled; None: numba is missing, not in use or has no cache."""
    if find_spec("numba") is None or os.environ.get(KERNELS, "auto") not in ("auto", "numba"):
        return None
    try:
        from ...compression.cpu import fingerprint_cpu
    except RuntimeError:  # numba's word for a cache that can be kept nowhere
        return None
    return Path(str(fingerprint_cpu._sum.stats.cache_path)) / _MARK


def _stamp(cache: Path) -> str:
    """What the compiled kernels depend on, as numba has it: versions, and when each source was changed."""
    sources = sorted(Path(__file__).parents[2].glob("*/*/*_cpu.py"))
    stamps = [f"{path.name} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in sources]
    text = "\n".join([sys.version, version("numba"), version("llvmlite"), str(cache), *stamps])
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    compile_kernels(to_stderr)
