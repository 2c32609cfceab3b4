"""A whole swarm of real processes on this machine, to be broken: `thinwire coordinator` and `thinwire join`,
each with a state folder of its own, over real sockets on 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.chaos.book import Book
from tests.chaos.coordinators import Coordinator, Coordinators
from tests.chaos.disk import Disk
from tests.chaos.program import Node, Program
from tests.chaos.proxy import Proxy
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.system.processes import PARENT_VARIABLE

HERE = Path(__file__).parent

SETTINGS: dict[str, Any] = {
    "run.name": "chaos",
    "run.rounds": 1_000_000,
    "run.eval_every": 50,
    "run.verify_every": 10,
    "run.snapshot_every": 20,
    "task.name": "custom",
    "task.layers": 8,
    "task.width": 64,
    "strategy.name": "decoupled",
    "strategy.lr": 1e-3,
    "strategy.beta": 0.95,
    "network.heartbeat_s": 0.5,
}
"""What every run file begins with; 33,280 parameters, payloads of some 5 kB."""


class Swarm:
    """Use as a context manager: at its end no process, socket, port or temporary folder of it is left.

    `settings`: dotted key -> value, over SETTINGS. `seed` gives `rng`, for whoever chooses what to break.
    `proxied`: each node reaches the coordinator through a proxy of its own. `strings`: nodes take orders.
    `work_s`: of a batch; a list is dealt out to the nodes in turn. `n_seats`: coordinators; of several each
    is reached through a proxy of its own, if `proxied`, and nodes have none. `upload`: what a coordinator
    takes its line to send.
    """

    def __init__(
        self,
        folder: Path,
        n_peers: int,
        *,
        settings: Mapping[str, Any] | None = None,
        seed: int = 1,
        proxied: bool = False,
        strings: bool = False,
        work_s: float | Sequence[float] = 0.05,
        n_seats: int = 1,
        upload: str | None = None,
    ) -> None:
        self.folder, self.proxied, self.strings = folder, proxied, strings
        self.rng = random.Random(seed)
        self.settings = {**SETTINGS, "run.min_peers": n_peers, **(settings or {})}
        folder.mkdir(parents=True, exist_ok=True)
        self._temp = Path(tempfile.mkdtemp(prefix="tw-"))
        path = [str(HERE), os.environ.get("PYTHONPATH", "")]
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in path if p),
            "TMPDIR": str(self._temp),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
            PARENT_VARIABLE: str(os.getpid()),
        }
        doors = proxied and n_seats > 1
        self.coordinators = Coordinators(folder, self._env, n_seats, through_doors=doors, hidden=proxied)
        self._orders: list[Program] = []
        self.coordinator = self.coordinators.first
        self.coordinator_state = self.coordinator.state
        self._upload = () if upload is None else ("--upload", upload)
        self._work_s = [work_s] if isinstance(work_s, float) else list(work_s)
        self.nodes = [self._node(i) for i in range(n_peers)]
        self.book = self.coordinators.book
        self.port = self.coordinator.port
        self.ticket = ""
        self.disks: dict[int, Disk] = {}
        """Small ones, of coordinators by their number: a fault may fill them."""
        self.struck: tuple[float, int] | None = None
        """When a coordinator was harmed, and the newest round then; taken by whoever measures."""

    def __enter__(self) -> Self:
        try:
            self.start_coordinator()
            self._start_replicas()
            for node in self.nodes:
                self.start(node)
            self.wait_counted(self.nodes, 90)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Kills everything and asserts that nothing is left behind."""
        coordinators = [*self.coordinators.all, *self.coordinators.gone]
        for program in (*self.nodes, *coordinators, *self._orders):
            program.kill()
        self.coordinators.close()
        for node in self.nodes:
            if node.proxy is not None:
                node.proxy.close()
        deadline_s = time.monotonic() + 10
        ports = [one.port for one in coordinators]
        while (left := self._left(ports)) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        shutil.rmtree(self._temp)
        assert not left, f"left behind: {left}"

    def _left(self, ports: Sequence[int]) -> list[str]:
        """Processes, files of theirs (sockets, too) and ports."""
        files = [str(path) for path in self._temp.iterdir()]
        return [*_running_in(self.folder), *files, *(f"port {port}" for port in ports if _is_open(port))]

    # -------------------------------------------------------------------------------- starting and adding

    def start_coordinator(self, *, wait: bool = True) -> None:
        """For the first time or again. `wait`: for its ticket."""
        run_file = self.folder / "run.toml"
        run_file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in self.settings.items()))
        several = len(self.coordinators.all)
        if several == 1:
            self.coordinator.begin([str(run_file), *self._task, *self._upload])
        else:
            tickets = ["--ticket-file", str(self.coordinators.ticket_file)]
            self.coordinator.begin([str(run_file), *self._task, "--seats", str(several), *tickets])
        if not wait:
            return
        self.wait(
            lambda: "\n" in self.coordinator.stdout() or not self.coordinator.is_running,
            60,
            "the coordinator's ticket",
        )
        ticket = self.coordinator.stdout().partition("\n")[0]
        assert ticket, f"no ticket:\n{self.coordinator.text()}"
        assert several > 1 or self.ticket in ("", ticket), "the same ticket for ever"
        self.ticket = ticket

    def strike(self) -> None:
        """Harm has just been done to a coordinator."""
        self.struck = time.monotonic(), self.head()

    def order(self, one: Coordinator, *what: str) -> None:
        """`thinwire run STATE ...` on its machine, whatever comes of it."""
        program = Program(f"order{time.monotonic_ns()}", self.folder, self._env)
        program.start(["run", str(one.state), *what])
        self._orders.append(program)

    def _start_replicas(self) -> None:
        """Returns when the committee is named."""
        n = len(self.coordinators.all)
        for one in self.coordinators.all[1:]:
            self.coordinators.replica(one)
        if n > 1:
            self.wait(self._has_all_seats, 90, f"a committee of {n} coordinators")

    def _has_all_seats(self) -> bool:
        self.ticket = self.coordinators.ticket_file.read_text().strip()
        return len(Ticket.parse(self.ticket).seats) == len(self.coordinators.all)

    def add(self) -> Node:
        """One more node; to be started."""
        self.nodes.append(self._node(len(self.nodes)))
        return self.nodes[-1]

    def _node(self, number: int) -> Node:
        work_s = self._work_s[number % len(self._work_s)]
        return Node(number, self.folder, {**self._env, "CHAOS_WORK_S": str(work_s)})

    def start(self, node: Node, program: Sequence[str] = ()) -> None:
        """For the first time or again. `program`: a script that begins in the place of `thinwire`, and what
        stands before its arguments."""
        node.orders.unlink(missing_ok=True)
        if self.strings:
            program = (str(HERE / "doomed.py"), str(node.orders))
        node.start(
            [
                *program[1:],
                *("join", "-", *self._task, "--threads", "1", "--host", "127.0.0.1"),
                *("--state", str(node.state), "--json"),
            ],
            self._ticket_for(node),
            Path(program[0]) if program else None,
        )

    @property
    def _task(self) -> tuple[str, ...]:
        return ("--task", "light_task:make") if self.settings["task.name"] == "custom" else ()

    def _ticket_for(self, node: Node) -> str:
        if not self.proxied or len(self.coordinators.all) > 1:
            return self.ticket
        if node.proxy is None:
            node.proxy = Proxy(self.port)
        ticket = Ticket.parse(self.ticket)
        address = f"/ip4/127.0.0.1/tcp/{node.proxy.port}"
        return ticket.model_copy(update={"addresses": (address,)}).line()

    # ------------------------------------------------------------------------------------------- looking

    def head(self) -> int:
        """The newest round on the coordinator's ledger."""
        return self.book.read()

    def head_of(self, one: Coordinator) -> int:
        """The newest round on this coordinator's own ledger."""
        return Book(one.ledger).read()

    def index(self, node: Node) -> int | None:
        """The node's index in commits; None: it was never admitted."""
        return self.book.indices.get(node.peer_id) if (node.state / "identity.key").exists() else None

    def is_counted(self, node: Node, after: int) -> bool:
        """Whether an offer of the node's counted in a round after that one, by what was read last."""
        index = self.index(node)
        return index is not None and self.book.counted(index, after)

    def own_records(self, node: Node) -> dict[int, bytes]:
        """Round -> record in the node's own copy of the ledger."""
        (path,) = node.state.glob("**/ledger.db")
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
            return dict(db.execute("SELECT round, record FROM record WHERE round > 0"))

    def agreed_round(self, nodes: Iterable[Node], after: int) -> int | None:
        """The first round after that one for which all these nodes reported one fingerprint."""
        indices = [self.index(node) for node in nodes]
        for round_, reports in sorted(self.book.fingerprints.items()):
            found = {reports.get(index) if index is not None else None for index in indices}
            if round_ > after and len(found) == 1 and None not in found:
                return round_
        return None

    def seen(self, n_lines: int = 12) -> str:
        """What there is to see, for the message of a failed wait."""
        lines = [f"round {self.head()}"]
        for program in (*self.coordinators.all, *self.nodes):
            state = (
                "frozen" if program.is_frozen else "runs" if program.is_running else f"ended {program.code}"
            )
            lines.append(f"--- {program.name}: {state}")
            if program.log.exists():
                lines += program.text().splitlines()[-n_lines:]
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------------- waiting

    def wait(self, condition: Callable[[], Any], limit_s: float, what: str) -> float:
        """Seconds that it took. Fails after `limit_s`, with everything that can be seen."""
        began_s = time.monotonic()
        while not condition():
            if time.monotonic() - began_s > limit_s:
                raise AssertionError(f"not within {limit_s:g} s: {what}\n{self.seen()}")
            time.sleep(0.05)
        return time.monotonic() - began_s

    def wait_rounds(self, n: int, limit_s: float = 30) -> int:
        """Until `n` more rounds are committed; returns the head."""
        goal = self.head() + n
        self.wait(lambda: self.head() >= goal, limit_s, f"round {goal}")
        return self.book.head

    def wait_counted(self, nodes: Sequence[Node], limit_s: float = 30) -> float:
        """Until each of them trains at the head: an offer of its counts in a round after the present one."""
        after = self.head()

        def all_counted() -> bool:
            self.head()
            return all(self.is_counted(node, after) for node in nodes)

        names = ", ".join(node.name for node in nodes)
        return self.wait(all_counted, limit_s, f"an offer of each of {names} counts after round {after}")

    def wait_agreed(self, nodes: Sequence[Node], limit_s: float = 60) -> int:
        """Until they all report one fingerprint for a round after the present one; returns that round."""
        after = self.head()
        agreed = None

        def is_agreed() -> bool:
            nonlocal agreed
            self.head()
            agreed = self.agreed_round(nodes, after)
            return agreed is not None

        names = ", ".join(node.name for node in nodes)
        self.wait(is_agreed, limit_s, f"one fingerprint of {names} for a round after {after}")
        assert agreed is not None
        return agreed

    def wait_text(self, program: Program, text: str, limit_s: float = 30) -> None:
        """Until it has logged this since its last start."""
        self.wait(lambda: text in program.text(), limit_s, f"{text!r} in the log of {program.name}")

    def wait_end(self, program: Program, limit_s: float = 30) -> int:
        """Its exit code."""
        self.wait(lambda: not program.is_running, limit_s, f"the end of {program.name}")
        assert program.code is not None
        return program.code


def _running_in(folder: Path) -> list[str]:
    """Command lines of processes that work in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and Path(process.cwd()) == folder:
                found.append(" ".join(process.info["cmdline"] or ["?"]))
    return found


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
