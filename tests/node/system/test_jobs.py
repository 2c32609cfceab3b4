"""Calls in processes of their own: what comes back, in which order, and that none is left."""

from __future__ import annotations

import operator
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import wait_until
from thinwire.compression.errors import ConfigError, ThinwireError
from thinwire.node.system.jobs import THREADS, Call, Done, Work, work_off


def halves(n: int) -> Work[list[int]]:
    """Asks for as many calls as it has halves, and then for one that needs them."""
    found = yield [Call(operator.floordiv, (n, 2**i)) for i in range(3)]
    (total,) = yield [Call(sum, (tuple(found),))]
    return [*found, total]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_works_get_what_they_ask_for(n_jobs: int) -> None:
    told: list[Done] = []
    found = dict(work_off([halves(16), halves(4), halves(16)], n_jobs, told.append))
    assert found == {0: [16, 8, 4, 28], 1: [4, 2, 1, 7], 2: [16, 8, 4, 28]}
    assert len(told) == 8  # of equal calls one is made


def test_in_this_process_works_come_in_their_order() -> None:
    ended = work_off([halves(8), halves(4)], 1)
    assert [number for number, _ in ended] == [0, 1]


def asked(*calls: Call) -> Work[list[str]]:
    return (yield calls)


def test_processes_have_one_thread_and_a_temporary_folder_that_goes() -> None:
    threads = [Call(os.getenv, (name,)) for name in THREADS]
    ((_, [folder, *found]),) = work_off([asked(Call(tempfile.gettempdir), *threads)], 2)
    assert found == ["1"] * len(THREADS)
    assert folder.startswith(tempfile.gettempdir() + os.sep)
    assert not Path(folder).exists()


def failing(error: Exception) -> Work[None]:
    yield [Call(time.sleep, (0.0,)), Call(exec, (f"raise {error!r}", {type(error).__name__: type(error)}))]


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_what_a_call_raises_is_raised(n_jobs: int) -> None:
    with pytest.raises(ConfigError, match="wrong"):
        list(work_off([failing(ConfigError("wrong"))], n_jobs))


def killed() -> Work[None]:
    yield [Call(os.abort)]


def test_a_process_that_is_killed_is_said() -> None:
    with pytest.raises(ThinwireError, match="killed"):
        list(work_off([killed()], 2))


PROGRAM = """
import sys, time
from thinwire.node.system.jobs import Call, until_stopped, work_off

def work(n):
    yield [Call(time.sleep, (n,))]
    return n

def rows():
    yield from work_off([work(0), work(600), work(601)], 3)

if __name__ == "__main__":
    sys.exit(until_stopped(rows(), lambda row: print(row, flush=True)))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(tmp_path: Path, number: signal.Signals) -> None:
    """Whatever ends the one that has started them; rows that there were have been told."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"(0, 0)\n"
        children = psutil.Process(program.pid).children(recursive=True)
        assert len(children) >= 4  # three, and that which forks them
        program.send_signal(number)
        assert program.wait() == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: not any(child.is_running() for child in children), 30, lambda: str(children))
    assert number == signal.SIGKILL or sorted(p.name for p in tmp_path.iterdir()) == ["program.py"]
