"""Child processes of a demo: a log for each, all gone when their parent is, and their files too."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

PARENT_VARIABLE = "THINWIRE_PARENT"
END_TIMEOUT_S = 10.0

# $1: a folder. Process ids come on stdin, whose other end only the parent holds: when the parent has ended,
# however it did, and then those processes have, the folder goes.
_KEEPER = """
while read -r pid; do pids="$pids $pid"; done
for pid in $pids; do
  while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
done
rm -rf -- "$1"
"""


@dataclass(slots=True)
class Child:
    """One `thinwire` process; its standard error goes to `folder`/log."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """SIGKILL to it, and to the other processes of a node of several ranks."""
        import psutil

        ranks = [
            p
            for p in psutil.Process(self.process.pid).children()
            if "thinwire.node.ranks.process" in p.cmdline()
        ]
        self.process.kill()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()

    def log_tail(self, n_lines: int = 15) -> str:
        """The end of what it logged, for an error message."""
        with contextlib.suppress(OSError):
            return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-n_lines:])
        return "(no log)"

    def first_line(self, timeout_s: float) -> str:
        """The first line of its standard output; empty if there is none within `timeout_s`."""
        pipe = self.process.stdout
        assert pipe is not None
        data = b""
        deadline_s = time.monotonic() + timeout_s
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline_s - time.monotonic()))
            chunk = os.read(pipe.fileno(), 4096) if ready else b""
            if not chunk:
                break
            data += chunk
        return data.decode(errors="replace").strip()


class Children:
    """Starts `thinwire` commands, ends all of them at the end of the `with`, and removes their `folder`."""

    def __init__(
        self,
        longest: int | None = None,
        python: str = sys.executable,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`longest`: characters that the path of the temporary folder may have, for what makes Unix sockets
        deep inside; a longer one is replaced by /tmp. `python`, `env`: of another `thinwire`, in addition to
        the environment here."""
        self._python, self._env = python, env
        root = tempfile.gettempdir()
        self.folder = Path(
            tempfile.mkdtemp(
                prefix="thinwire-demo-", dir="/tmp" if longest is not None and len(root) > longest else None
            )
        )
        self._all: list[Child] = []
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "thinwire-demo", str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.close()
        self._watchdog.wait()

    def start(
        self, name: str, folder: Path, args: Sequence[str], *, line: str | None = None, output: bool = False
    ) -> Child:
        """Runs `thinwire ARGS`; `line` is given to its standard input, `output`: its stdout can be read."""
        folder.mkdir(exist_ok=True)
        with (folder / "log").open("ab") as log_file:
            process = subprocess.Popen(
                [self._python, "-m", "thinwire.node.cli.main", *args],
                stdin=subprocess.DEVNULL if line is None else subprocess.PIPE,
                stdout=subprocess.PIPE if output else subprocess.DEVNULL,
                stderr=log_file,
                env={**os.environ, **self._env, PARENT_VARIABLE: str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends them in order
            )
        child = Child(name, folder, process)
        self._all.append(child)
        self.wait_for(process.pid)
        if line is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended already: whoever waits for it says why
                process.stdin.write(line.encode() + b"\n")
                process.stdin.close()
        return child

    def wait_for(self, pid: int) -> None:
        """The folder stays until this process has ended, too."""
        assert self._watchdog.stdin is not None
        self._watchdog.stdin.write(b"%d\n" % pid)
        self._watchdog.stdin.flush()

    def end(self) -> None:
        """SIGTERM to the newest first, SIGKILL to what has not ended within 10 s. All are forgotten then."""
        for child in reversed(self._all):
            if child.process.poll() is None:
                child.process.terminate()
        deadline_s = time.monotonic() + END_TIMEOUT_S
        for child in self._all:
            try:
                child.process.wait(max(0.1, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            if child.process.stdout is not None:
                child.process.stdout.close()
        self._all.clear()


def end_with_parent() -> None:
    """In a child: a SIGTERM to itself within a second of its parent's death, however that died.

    Nobody is left to see that it does not end: so it is killed after a while.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
