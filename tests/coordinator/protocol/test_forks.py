"""A process with forks, as the workers of a data loader are: what only it may have open ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.waiting import wait_until
from thinwire.coordinator.protocol.files import FolderLock

PROGRAM = """
import asyncio, os, sys, time, warnings
from pathlib import Path
from thinwire.coordinator.protocol import p2p_daemon
from thinwire.coordinator.protocol.files import FolderLock
from thinwire.coordinator.protocol.identity import new_key
from thinwire.coordinator.protocol.p2p_daemon import start_daemon

p2p_daemon._END_TIMEOUT_S = 60.0
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: there are none here

async def main():
    lock = FolderLock(Path(sys.argv[1]), "node")
    daemon = await start_daemon(new_key(), "/ip4/127.0.0.1/tcp/0")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, daemon.pid, flush=True)
    if sys.argv[2] == "killed":
        await asyncio.sleep(60)
    began_s = time.monotonic()
    await daemon.end()
    lock.close()
    FolderLock(Path(sys.argv[1]), "node").close()
    assert time.monotonic() - began_s < 30

asyncio.run(main())
"""


def program(folder: Path, how: str) -> tuple[subprocess.Popen[str], int, int]:
    """It, its child, and the daemon's process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child, daemon = map(int, process.stdout.readline().split())
    return process, child, daemon


def test_a_fork_keeps_neither_lock_nor_daemon(tmp_path: Path) -> None:
    """Whether its parent ends in order, or is killed."""
    for how in ("in order", "killed"):
        process, child, daemon = program(tmp_path, how)
        with process:
            try:
                if how == "killed":
                    process.kill()
                assert process.wait(50) == (0 if how == "in order" else -signal.SIGKILL)
                assert psutil.pid_exists(child)
                wait_until(lambda: not psutil.pid_exists(daemon), 10, lambda: "the daemon is there")  # noqa: B023
                FolderLock(tmp_path, "node").close()
            finally:
                process.kill()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
