"""A node of several processes: starts its ranks, watches them, and ends all of them when one has failed.

torch's own launcher would do most of this, but gives a rank that hangs in a collective 30 s before it is
killed, takes over SIGTERM, and loads torch in a process that only waits.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from ...compression.errors import ConfigError, ThinwireError
from ..result import Result
from ..run_node import Options
from ..system.command_name import name_for_children
from ..system.folder import default_folder
from ..system.processes import PARENT_VARIABLE
from .process import RESULT, Failure

if TYPE_CHECKING:
    from ..system.stopping import Stop

log = logging.getLogger("thinwire.node")

LEAVE_S: Final = 5.0
"""How long the other ranks have to end by themselves after one has failed: rank 0 leaves the swarm."""

_PREFIX: Final = ".ranks-"
_POLL_S: Final = 0.05
_TRACE_LINES: Final = 12


class RankFailed(ThinwireError):
    """A rank ended, and the node with it. `exit_code`: the rank's own where it said why on purpose."""

    def __init__(self, text: str, exit_code: int = 1, *, is_told: bool = False) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.is_told = is_told


def run_ranks(options: Options, stop: Stop) -> Result | None:
    """The node until the run ends; None: `stop` was set before. Raises RankFailed."""
    for n_left in range(options.restart, -1, -1):
        try:
            return _Ranks(options, stop).run()
        except RankFailed as e:
            if e.is_told or n_left == 0 or stop.is_set():
                raise
            log.error("%s", e)
            n = options.restart - n_left + 1
            log.warning("starting the node again from its snapshot (%d of %d times)", n, options.restart)
    raise AssertionError("unreachable")


class _Ranks:
    """The processes of one attempt."""

    def __init__(self, options: Options, stop: Stop) -> None:
        self._options, self._stop = options, stop
        self._count = options.ranks or 1
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> Result | None:
        """The node's result; None: `stop` was set. Raises RankFailed."""
        self._folder = _meeting_place(self._options.state or default_folder(os.environ))
        self._stop.on_stop.append(self._leave)
        try:
            for rank in range(self._count):
                self._processes.append(self._start(rank))
            if self._stop.is_set():
                self._leave()
            failed = self._first_failed()
            if failed is not None and not self._stop.is_set():
                raise self._error(failed)
            return None if self._stop.is_set() else self._result()
        finally:
            self._stop.on_stop.remove(self._leave)
            self._kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        threads = self._options.threads or max(1, _cores() // self._count)
        process = subprocess.Popen(
            [sys.executable, "-m", "thinwire.node.ranks.process"],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno(),
            env={
                **os.environ,
                PARENT_VARIABLE: str(os.getpid()),
                **name_for_children(),
                "OMP_NUM_THREADS": str(threads),
            },
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        spec = {
            "rank": rank,
            "folder": str(self._folder),
            "log_level": logging.getLogger("thinwire").getEffectiveLevel(),
            "options": {**self._options.to_plain(), "threads": threads},
        }
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already: whoever waits for it says why
            process.stdin.write(json.dumps(spec).encode() + b"\n")
            process.stdin.close()
        return process

    def _leave(self) -> None:
        """Rank 0 leaves the swarm, and then tells the others."""
        if self._processes:
            self._processes[0].terminate()

    def _first_failed(self) -> int | None:
        """Waits until all have ended, or one has failed and the others had their time. Which failed first."""
        while True:
            codes = [p.poll() for p in self._processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed or codes[0] == 0:
                break
            time.sleep(_POLL_S)
        if failed:
            self._leave()
        deadline_s = time.monotonic() + LEAVE_S
        while time.monotonic() < deadline_s and any(p.poll() is None for p in self._processes):
            time.sleep(_POLL_S)
        # Who was killed was the first, whatever the others say of lost connections.
        self._codes = [p.poll() for p in self._processes]
        if codes[0] == 0:
            return None
        killed = [rank for rank in failed if (codes[rank] or 0) < 0]
        told = [f for rank in failed if (f := Failure.read(self._folder, rank)) is not None]
        told.sort(key=lambda f: f.time_s)
        return killed[0] if killed else told[0].rank if told else failed[0] if failed else None

    def _error(self, rank: int) -> RankFailed:
        failure = Failure.read(self._folder, rank)
        own = Failure.read(self._folder, 0)
        if own is not None and own.is_told and (failure is None or failure.is_told):
            return RankFailed(own.text, own.exit_code, is_told=True)
        if failure is None:
            why = _ending(self._codes[rank])
        else:
            lines = failure.trace.rstrip().splitlines()[-_TRACE_LINES:]
            why = failure.text + "".join(f"\n    {line}" for line in lines)
        advice = "the same command starts the node again from its snapshot, --restart N does so by itself"
        return RankFailed(f"rank {rank} failed: {why}\n{advice}")

    def _result(self) -> Result | None:
        plain: dict[str, Any] | None = json.loads((self._folder / RESULT).read_bytes())
        if plain is None:
            return None
        held_out = tuple((int(round_), float(loss)) for round_, loss in plain["held_out"])
        return Result(**{**plain, "held_out": held_out})

    def _kill(self) -> None:
        """Whatever is left of them; what rank 0 has started ends with it."""
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _meeting_place(state: Path) -> Path:
    """An own folder of this process; those of others that were killed go. Raises ConfigError."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        for old in state.glob(f"{_PREFIX}*"):
            if not psutil.pid_exists(int(old.name.removeprefix(_PREFIX))):
                shutil.rmtree(old, ignore_errors=True)
        folder = state.resolve() / f"{_PREFIX}{os.getpid()}"
        folder.mkdir()
    except OSError as e:
        raise ConfigError(f"the node's folder {state} cannot be used: {e.strerror}") from e
    return folder


def _ending(code: int | None) -> str:
    if code is None:
        return "it did not end"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory? fewer samples, more ranks or --activation-checkpointing need less)"
    return f"killed by {name}{hint if name == 'SIGKILL' else ''}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
