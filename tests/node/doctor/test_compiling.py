"""Kernels are compiled once for a machine, and who has to wait for that is told."""

from __future__ import annotations

import fcntl
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("numba", reason="the numba kernels are an extra")

import numba

from thinwire.node.doctor import compiling, kernel_cache
from thinwire.node.doctor.kernel_cache import is_compiled
from thinwire.node.doctor.known_answers import KNOWN_ANSWERS, KnownAnswer

LARGE = np.zeros(2**20)
"""Numba keeps by its address what has a megabyte."""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of which nobody has said yet that everything is in it."""
    path = tmp_path / "mark"
    for module in (compiling, kernel_cache):
        monkeypatch.setattr(module, "mark_path", lambda: path)
    return path


def test_it_is_said_once(mark: Path) -> None:
    said: list[str] = []
    assert not is_compiled()
    with compiling.compiling(said.append):
        assert said
    assert is_compiled()
    with compiling.compiling(said.append):
        assert len(said) == 1
    mark.write_text("kernels of another version")
    assert not is_compiled()


@pytest.mark.usefixtures("mark")
def test_what_failed_is_not_taken_for_compiled() -> None:
    with pytest.raises(ZeroDivisionError), compiling.compiling(print):
        raise ZeroDivisionError
    assert not is_compiled()


def test_who_is_stopped_compiles_no_longer_and_waits_for_nobody(mark: Path) -> None:
    with compiling.compiling(print), compiling.compiling(print, lambda: True):
        assert not is_compiled()
    assert is_compiled()
    mark.unlink()
    with compiling.compiling(print, lambda: True):
        pass
    assert not is_compiled()


@pytest.mark.usefixtures("mark")
def test_processes_of_one_machine_do_not_all_compile() -> None:
    entered = threading.Event()

    def second() -> None:
        with compiling.compiling(print):
            entered.set()

    with compiling.compiling(print):
        other = threading.Thread(target=second)
        other.start()
        assert not entered.wait(0.3)
    other.join(30)
    assert entered.is_set()


def test_one_that_hangs_keeps_nobody_out(mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LONGEST_WAIT_S", 0.2)
    with mark.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with compiling.compiling(print):
            pass
    assert is_compiled()


def test_a_mark_that_cannot_be_written_keeps_nobody_out(mark: Path) -> None:
    """A full disk, or a file system without locks."""
    mark.mkdir()
    with compiling.compiling(print):
        pass
    assert not is_compiled()


def test_where_no_process_begins_kernels_are_compiled_where_they_are_needed(
    mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "executable", str(mark))
    compiling.compile_apart(said.append)
    assert len(said) == 1
    assert not is_compiled()
    mark.write_text(kernel_cache.stamp(mark.parent))
    compiling.compile_apart(said.append)
    assert len(said) == 1


@pytest.mark.usefixtures("mark")
def test_the_process_that_compiles_is_ended_when_this_one_is_to_end() -> None:
    before = psutil.Process().children()
    compiling.compile_apart(print, lambda: True)
    assert not is_compiled()
    assert psutil.Process().children() == before


def test_a_kernel_that_cannot_be_cached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that has a large array in it."""
    kernel = numba.njit(cache=True)(lambda i: LARGE[i])
    monkeypatch.setitem(KNOWN_ANSWERS, "large", KnownAnswer(lambda _device: int(kernel(0)), 0))
    on_interrupt, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiling._begin()
            with pytest.raises(RuntimeError, match=r"large .*Cannot cache compiled function"):
                compiling._compile("large")
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        torch.set_num_threads(threads)


def test_plain_kernels_need_no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    assert is_compiled()
