"""Processes of `thinwire` that start in a fifth of the time: a process that has loaded all that they need,
and does nothing else, is forked for each.

What begins is the command as `python -m` begins it, with a working folder, an environment and streams of its
own, and it ends as every interpreter does. THINWIRE_FORK=0 starts each as users do, so that it loads all
itself; so do `thinwire demo`, Ray and nodes of several ranks with theirs.

This file is the program of that process, too, which knows nothing of `tests`.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

MODULE = "thinwire.node.cli.main"
HEAVY = [
    "thinwire.coordinator.observe.page",
    "thinwire.coordinator.server",
    "thinwire.node.cli.coordinator",
    "thinwire.node.cli.local_commands",
    "thinwire.node.cli.status",
    "thinwire.node.cli.swarm_commands",
    "thinwire.node.cli.tool_commands",
    "thinwire.node.doctor.self_test",
    "thinwire.node.founding.process",
    "thinwire.node.ranks.join",
    "thinwire.node.run_node",
    "thinwire.node.tasks.text",
]


class Forked:
    """A running process; what of `subprocess.Popen` tests use."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote, self.pid = zygote, pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._zygote.codes.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        with self._zygote.changed:
            if not self._zygote.changed.wait_for(lambda: self.poll() is not None, timeout):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._zygote.codes[self.pid]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """That process, and what came of those that were forked of it. `env`: what it begins with."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.codes: dict[int, int] = {}
        self.changed = threading.Condition()
        self._started: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in env.items() if name != "PYTHONPATH"},
            start_new_session=True,  # Ctrl-C is meant for pytest, which ends them
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(
        self,
        args: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        out: Path,
        err: Path,
        line: str | None = None,
        script: Path | None = None,
        module: str = MODULE,
        session: bool = False,
        host: str | None = None,
    ) -> Forked:
        """Runs `thinwire ARGS`, or a Python script or another module with them. `out` begins anew, `err` is
        appended to; `line` is all of its standard input. `session`: it leads one of its own. `host`: the
        network namespace that it is in, as `ip netns` names it."""
        files = {"out": str(out), "err": str(err), "line": line, "cwd": str(cwd)}
        what = {"args": list(args), "script": script and str(script), "module": module}
        request = {**what, **files, "env": dict(env), "session": session, "host": host}
        out.write_bytes(b"")
        err.touch()
        assert self._process.stdin is not None
        with self.changed:
            n_before = len(self._started)
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            if not self.changed.wait_for(lambda: len(self._started) > n_before, 60):
                raise RuntimeError("the process that others are forked of does not answer")
            return Forked(self, self._started[-1])

    def end(self) -> None:
        """It kills what it has forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                word, pid, code = line.split()
                with self.changed:
                    if word == b"begun":
                        self._started.append(int(pid))
                        self.codes.pop(int(pid), None)  # the number of one that ended long ago
                    else:
                        self.codes[int(pid)] = int(code)
                    self.changed.notify_all()


@cache
def zygote() -> Zygote | None:
    """The one of this process; None: there shall be none."""
    if os.environ.get("THINWIRE_FORK") == "0":
        return None
    made = Zygote(os.environ)
    atexit.register(made.end)
    return made


# ------------------------------------------------------------------------------------ within that process


def _serve() -> dict[str, Any]:
    """Forks for every request, until its standard input ends. Returns in the forked process: its request."""
    requests, answers = os.dup(0), os.dup(1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    running: set[int] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        data = b""
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if woken in ready:
                os.read(woken, 4096)
                _tell_ends(running, answers)
            if requests not in ready:
                continue
            chunk = os.read(requests, 65536)
            if not chunk:
                _kill(running)
            *lines, data = (data + chunk).split(b"\n")
            for line in lines:
                if (pid := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for fd in (requests, answers, woken, wake):
                        os.close(fd)
                    found: dict[str, Any] = json.loads(line)
                    return found
                running.add(pid)
                os.write(answers, b"begun %d 0\n" % pid)


def _tell_ends(running: set[int], answers: int) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            running.discard(pid)
            os.write(answers, b"ended %d %d\n" % (pid, os.waitstatus_to_exitcode(status)))


def _kill(running: set[int]) -> NoReturn:
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    for pid in running:
        os.waitpid(pid, 0)
    os._exit(0)


def _become(request: Mapping[str, Any]) -> None:
    """Runs it. Raises SystemExit with its code."""
    if request["host"]:
        _enter(request["host"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    _open_streams(request)
    _renew_threads()
    script = request["script"]
    own = [str(Path(script).parent) if script else request["cwd"]]
    sys.path[:1] = [*own, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)]
    if request["session"]:
        os.setsid()
    if script:
        sys.argv = [script, *request["args"]]
        runpy.run_path(script, run_name="__main__")
    else:
        sys.argv = [request["module"], *request["args"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _renew_threads() -> None:
    """Torch makes its pool anew at the first use after a fork, and not safely: threads that begin together,
    as those that read a model's weights, may find none ("Invalid thread pool!", torch 2.13)."""
    import torch

    torch.set_num_threads(torch.get_num_threads())


def _enter(host: str) -> None:
    """What `ip netns exec` does to the network; os.setns is younger than Python 3.11."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{host}", "rb") as namespace:
        if libc.setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"setns to {host}")


def _open_streams(request: Mapping[str, Any]) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"" if request["line"] is None else request["line"].encode() + b"\n")
    os.close(writing)
    created = os.O_WRONLY | os.O_CREAT
    for fd, opened in (
        (0, reading),
        (1, os.open(request["out"], created | os.O_TRUNC, 0o644)),
        (2, os.open(request["err"], created | os.O_APPEND, 0o644)),
    ):
        os.dup2(opened, fd)
        os.close(opened)


def _load() -> None:
    """What nodes load before their first round, compiled kernels included."""
    import torch

    for name in HEAVY:
        import_module(name)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not outlive a fork
    with suppress(Exception):  # every node compares again, and says what is wrong
        import_module("thinwire.node.doctor.self_test").refuse_wrong_arithmetic(torch.device("cpu"))
    torch.set_num_threads(n_threads)
    gc.freeze()


if __name__ == "__main__":
    _load()
    _become(_serve())
