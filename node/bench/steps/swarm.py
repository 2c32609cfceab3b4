"""A run whose rounds are measured: a coordinator and nodes as processes, through the command line, and what
they, with libp2p's daemons, take of the machine once all of them train."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final

from ....compression.errors import ThinwireError
from ...run_files.toml import toml_of
from ...system.processes import Child, Children
from ..network.delayed import Delays

BUILD_VARIABLE: Final = "THINWIRE_BENCH_BUILD"
"""JSON: the Python of another build and the folder that has it, whose command line is measured."""

WARM_UP_ROUNDS: Final = 20
TIMEOUT_S: Final = 120.0
LOOK_EVERY_S: Final = 0.01
TOLD_ADDRESSES: Final = 32
"""So many of a machine's addresses are given to others, those that are announced first."""

Door = Callable[[int], int]
"""A port of this machine -> the one by which others reach it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """`sections`: of the run file, beside `run`; after a warm-up, rounds are measured in `n_windows` times
    `window_rounds`."""

    n_peers: int
    sections: Mapping[str, Mapping[str, Any]]
    n_windows: int
    window_rounds: int
    warm_up_rounds: int = WARM_UP_ROUNDS

    @property
    def n_rounds(self) -> int:
        return self.warm_up_rounds + self.n_windows * self.window_rounds + 1


@dataclass(frozen=True, slots=True)
class Sample:
    """CPU time since the processes began, of the coordinator and of all nodes."""

    round: int
    wall_s: float
    coordinator_s: float
    nodes_s: float


def measure_swarm(plan: Plan, delays: Delays | None = None) -> dict[str, Any]:
    """Of a round: wall time, and CPU time for each peer, with its share of the coordinator's. `delays`: what
    all connections go through. Raises ThinwireError."""
    python, path = json.loads(os.environ.get(BUILD_VARIABLE, "null")) or (sys.executable, None)
    env = {} if path is None else {"PYTHONPATH": path}
    with Children(python=python, env=env) as children:
        swarm = _Swarm(plan, children, delays)
        windows = list(pairwise(swarm.samples()))
        sent = swarm.sent_bytes()
    per_peer = [(b.round - a.round) * plan.n_peers for a, b in windows]
    coordinator = [
        (b.coordinator_s - a.coordinator_s) / n for (a, b), n in zip(windows, per_peer, strict=True)
    ]
    nodes = [(b.nodes_s - a.nodes_s) / n for (a, b), n in zip(windows, per_peer, strict=True)]
    return {
        "round": {
            **spread([(b.wall_s - a.wall_s) / (b.round - a.round) for a, b in windows]),
            "cpu_s": median(map(sum, zip(coordinator, nodes, strict=True))),
        },
        "node_cpu": spread(nodes),
        "coordinator_cpu": spread(coordinator),
        "sent_bytes_per_peer_and_round": sent / (plan.n_peers * plan.n_rounds),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median_s": median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


class _Swarm:
    def __init__(self, plan: Plan, children: Children, delays: Delays | None) -> None:
        self._plan, self._children, self._delays = plan, children, delays
        self._state = children.folder / "state"
        run_file = children.folder / "run.toml"
        run = {"rounds": plan.n_rounds, "min_peers": plan.n_peers, "eval_every": plan.n_rounds + 1}
        run_file.write_text(toml_of({"run": run, **plan.sections}))
        args = ["coordinator", str(run_file), "--state", str(self._state)]
        if (
            BUILD_VARIABLE not in os.environ
        ):  # older ones know no other way; nobody uploads a snapshot at the end
            args += ["--linger", "0"]
        self._coordinator = children.start(
            "coordinator", children.folder / "coordinator", [*args, *self._where()], output=True
        )
        if not (ticket := self._coordinator.first_line(TIMEOUT_S)):
            raise ThinwireError(f"no ticket; the log of it ends with:\n{self._coordinator.log_tail()}")
        self._nodes = [self._start_node(i, ticket) for i in range(plan.n_peers)]

    def _start_node(self, i: int, ticket: str) -> Child:
        folder = self._children.folder / f"node-{i}"
        args = ["join", "-", "--device", "cpu", "--threads", "1", "--state", str(folder / "state")]
        return self._children.start(f"node {i}", folder, [*args, *self._where()], line=ticket)

    def _where(self) -> list[str]:
        """Nobody is told the port itself where there is a door to it: as many others as are told, where
        nobody listens, come before it."""
        args = ["--host", "127.0.0.1"]
        if self._delays is None:
            return args
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        told = [self._delays.door(port), *range(1, TOLD_ADDRESSES)]
        args += ["--port", str(port)]
        return args + [f"--announce=/ip4/127.0.0.1/tcp/{each}" for each in told]

    def samples(self) -> Iterator[Sample]:
        """At the beginning of each window, and at the end of the last one."""
        for i in range(self._plan.n_windows + 1):
            yield self._sample_at(self._plan.warm_up_rounds + i * self._plan.window_rounds)

    def _sample_at(self, round_: int) -> Sample:
        deadline_s = time.monotonic() + TIMEOUT_S
        while (now := self._round()) < round_:
            for child in (self._coordinator, *self._nodes):
                if child.process.poll() is not None or time.monotonic() > deadline_s:
                    raise ThinwireError(
                        f"no round {round_}; the log of {child.name} ends with:\n{child.log_tail()}"
                    )
            time.sleep(LOOK_EVERY_S)
        return Sample(now, time.monotonic(), _cpu_s(self._coordinator), sum(map(_cpu_s, self._nodes)))

    def _round(self) -> int:
        """In the ledger: to ask the coordinator would take its time."""
        with closing(sqlite3.connect(f"file:{self._state / 'ledger.db'}?mode=ro", uri=True)) as db:
            found: int = db.execute("SELECT max(round) FROM record").fetchone()[0]
        return found

    def sent_bytes(self) -> int:
        """By all nodes, from their start to their end."""
        for child in self._nodes:
            child.process.wait(TIMEOUT_S)
        self._coordinator.process.terminate()
        self._coordinator.process.wait(TIMEOUT_S)
        status = json.loads((self._state / "result.json").read_text())
        return sum(peer["sent_bytes"] for peer in status["peers"])


def _cpu_s(child: Child) -> float:
    """Of the process, and of its daemon."""
    import psutil

    process = psutil.Process(child.process.pid)
    return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))
