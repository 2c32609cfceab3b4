"""A `thinwire` command as a process that can be killed, frozen and given orders."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.proxy import Proxy
from tests.support.zygote import Forked, zygote
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.node.system.processes import PARENT_VARIABLE


class Program:
    """A `thinwire` command as a process. Its log goes on over restarts; `text` is the part since the last."""

    def __init__(self, name: str, folder: Path, env: Mapping[str, str]) -> None:
        self.name, self.folder = name, folder
        self.log, self.out = folder / f"{name}.log", folder / f"{name}.out"
        self._env = env
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._began_at = 0
        self.is_frozen = False

    def start(self, args: Sequence[str], line: str | None = None, script: Path | None = None) -> None:
        """`line` is given to its standard input. `script`: what begins in the place of `thinwire`."""
        assert not self.is_running, f"{self.name} runs already"
        self._began_at = self.log.stat().st_size if self.log.exists() else 0
        if (forker := zygote()) is not None:
            env = {**self._env, PARENT_VARIABLE: str(forker.pid)}
            self._process = forker.start(
                args,
                cwd=self.folder,
                env=env,
                out=self.out,
                err=self.log,
                line=line,
                script=script,
                session=True,
            )
        else:
            self._load(args, line, script)

    def _load(self, args: Sequence[str], line: str | None, script: Path | None) -> None:
        """As users start it: it loads everything itself."""
        launcher = ["-m", "thinwire.node.cli.main"] if script is None else [str(script)]
        with self.log.open("ab") as err, self.out.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, *args],
                stdin=subprocess.PIPE if line is not None else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.folder,
                env=self._env,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
            )
        if line is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code; negative: the signal that ended it."""
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        """SIGKILL, and waits for its end; its libp2p daemon follows it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.is_frozen = False

    def freeze(self) -> None:
        """SIGSTOP, as a machine that hangs: its libp2p daemon answers no more either."""
        self.is_frozen = True
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)
        self.is_frozen = False

    def text(self, *, whole: bool = False) -> str:
        """What it logged since its last start."""
        with self.log.open("rb") as file:
            file.seek(0 if whole else self._began_at)
            return file.read().decode(errors="replace")

    def stdout(self) -> str:
        return self.out.read_text()

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """It and its daemon; not the small shell that cleans up behind both."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            below = process.children(recursive=True)
            return [process, *(p for p in below if p.name() == "p2pd")]
        return []


class Node(Program):
    """A node of the swarm. `orders`: a file for `doomed.py`, if it was started with strings attached."""

    def __init__(self, number: int, folder: Path, env: Mapping[str, str]) -> None:
        super().__init__(f"node{number}", folder, env)
        self.number = number
        self.state = folder / f"node{number}"
        self.orders = folder / f"node{number}.orders"
        self.proxy: Proxy | None = None

    @property
    def peer_id(self) -> str:
        return peer_id_of(load_or_create(self.state / "identity.key").public_key())

    def order(self, **what: Any) -> None:
        """See `doomed.Orders`. Replaces an order that was not carried out yet."""
        aside = self.orders.with_suffix(".part")
        aside.write_text(json.dumps(what))
        aside.rename(self.orders)

    @property
    def was_obeyed(self) -> bool:
        return not self.orders.exists()
