"""The CPU kernels compiled once for this machine, so that no round of a run has to wait for that.

numba compiles a kernel when it is first called, and keeps it on disk: about half a minute for all of them.
Nodes that start together on a new machine would each do it. `python -m thinwire.node.doctor.compiling` does
it on all cores, as `make setup` and `thinwire demo` do. To find that there is nothing to do takes no torch.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from ..system.every import Every
from ..system.output import to_stderr
from ..system.processes import PARENT_VARIABLE, end_with_parent
from .kernel_cache import is_compiled, mark_path, stamp

LONGEST_WAIT_S: Final = 300.0
_STEP: Final = "a step"
_APART: Final = "apart"
_SAID: Final = "compiling kernels for this machine: once, for half a minute or, on busy cores, a few"
_UNCACHED: Final = "Cannot cache compiled function"
"""How numba begins to say so."""


@contextmanager
def compiling(say: Callable[[str], object], stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Around a self-test, which compiles what is not there yet: one process of a machine at a time does it,
    where its files can be locked and written.

    `say` is told, if there is anything to compile. `stopped`: no longer; then not everything is compiled."""
    if (mark := _wanted()) is None:
        yield
        return
    say(_SAID)
    with ExitStack() as stack:
        with suppress(OSError):
            _wait_for(stack.enter_context(mark.open("a")), stopped)
        yield
        if stopped():
            return
        _step()
        with suppress(OSError):
            mark.write_text(stamp(mark.parent))


def _wanted() -> Path | None:
    """Where it is to be noted that everything is compiled; None: it is already, or cannot be kept."""
    mark = mark_path()
    return None if mark is None or is_compiled() or not os.access(mark.parent, os.W_OK) else mark


def compile_apart(say: Callable[[str], object], stopped: Callable[[], bool] = lambda: False) -> None:
    """In a process of its own, one core's work: what compiling takes, 300 MB, would stay with this one. Where
    that fails, kernels are compiled where they are needed. When `stopped`, the process is ended."""
    if _wanted() is None:
        return
    say(_SAID)
    with suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, _APART],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,  # Ctrl-C is the parent's affair
        )
        while process.poll() is None:
            if stopped():
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)


def _apart() -> None:
    """The process of `compile_apart`."""
    end_with_parent()
    import torch

    from .self_test import refuse_wrong_arithmetic

    torch.set_num_threads(1)
    with compiling(str):
        refuse_wrong_arithmetic(torch.device("cpu"))


def _wait_for(lock: IO[str], stopped: Callable[[], bool]) -> None:
    """Until no other process has it, or is taken to hang: that must keep nobody out of a run. Raises
    OSError."""
    until_s = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < until_s and not stopped():
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.1)


def compile_kernels(say: Callable[[str], object], stopped: Callable[[], bool] = lambda: False) -> None:
    """Compiles what is not there yet, on all cores; until `stopped`."""
    if is_compiled():
        return
    from .known_answers import KNOWN_ANSWERS

    names = [name for name, known in KNOWN_ANSWERS.items() if not known.is_slow]
    names = [*reversed(names), _STEP]  # what takes longest is among the last, and has to begin early
    with compiling(say, stopped):
        if is_compiled():  # by another process, meanwhile
            return
        with multiprocessing.get_context("spawn").Pool(initializer=_begin) as pool:
            every = Every(5.0)
            for n, _ in enumerate(pool.imap_unordered(_compile, names), 1):
                if stopped():
                    return
                if every.is_due():
                    say(f"{n} of {len(names)} groups of kernels are compiled")


def _begin() -> None:
    """In a worker: Ctrl-C is the parent's affair, which ends it, and the cores are taken. A kernel that
    cannot be cached is an error: every start would compile it."""
    import torch

    warnings.filterwarnings("error", message=_UNCACHED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _compile(name: str) -> None:
    """Raises RuntimeError: numba cannot cache a kernel."""
    if name == _STEP:
        _step()
        return
    import torch

    from .self_test import failed_kernels

    failed = failed_kernels(torch.device("cpu"), names=[name])
    if any(_UNCACHED in text for text in failed):  # whether it is right, a node asks before it joins
        raise RuntimeError("; ".join(failed))


def _step() -> None:
    """Kernels that take many small parameters in one call, which no known answer needs."""
    import torch

    from ...optim.registry import build_strategy

    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(3)]
    named = [(str(i), parameter) for i, parameter in enumerate(parameters)]
    optimizer = build_strategy({"name": "decoupled", "lr": 1e-3}, named)
    optimizer.step(lambda: torch.stack([p.square().sum() for p in parameters]).sum())


if __name__ == "__main__":
    if sys.argv[1:] == [_APART]:
        _apart()
    else:
        compile_kernels(to_stderr)
