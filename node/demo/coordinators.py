"""The coordinators of a demo, as processes: one, or the seats of a committee."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ConfigError, LedgerCorrupt
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.protocol.ticket import Ticket
from ..states.opening import open_state
from ..system.processes import Child, Children
from .plan import DemoFailed, DemoPlan

START_TIMEOUT_S: Final = 60.0
LOOK_EVERY_S: Final = 0.1


class Coordinators:
    """`start` returns when nodes may come: `ticket` names all of them then."""

    def __init__(self, plan: DemoPlan, children: Children, folder: Path, run_file: Path) -> None:
        self._plan, self._children, self._folder, self._run_file = plan, children, folder, run_file
        self.running: dict[str, Child] = {}
        self.ticket = ""

    @property
    def n(self) -> int:
        return self._plan.n_coordinators

    def start(self, stopped: Callable[[], bool]) -> None:
        """Raises DemoFailed. Returns early once `stopped`."""
        first = self.restart(self._name(0))
        self.ticket = first.first_line(START_TIMEOUT_S)
        if not self.ticket:
            raise DemoFailed(f"no ticket; the coordinator's log ends with:\n{first.log_tail()}")
        if self.n == 1:
            return
        for i in range(1, self.n):
            self.restart(self._name(i))
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while len(Ticket.parse(self.ticket).seats) < self.n and not stopped():
            for child in self.running.values():
                if child.process.poll() is not None or time.monotonic() > deadline_s:
                    raise DemoFailed(f"no committee; {child.name}'s log ends with:\n{child.log_tail()}")
            time.sleep(LOOK_EVERY_S)
            self.ticket = self._ticket_file.read_text().strip()

    def restart(self, name: str) -> Child:
        """The same command as the first time; what it has on the disk is there."""
        folder = self._folder / name
        args = ["coordinator", "--state", str(folder / "state"), "--host", "127.0.0.1", "--linger", "0"]
        is_first = name == self._name(0)
        if is_first:
            args += [str(self._run_file), *self._first_only()]
        else:
            args += ["--replica", str(self._folder / self._name(0) / "state" / "seat-ticket")]
        args += self._http(is_first)
        self.running[name] = self._children.start(name, folder, args, output=is_first)
        return self.running[name]

    def kill(self, peer_id: str) -> str:
        """SIGKILL; returns its name."""
        (name,) = [name for name in self.running if self.peer_id(name) == peer_id]
        self.running[name].kill()
        return name

    def peer_id(self, name: str) -> str:
        key = load_or_create(self._folder / name / "state" / "key")
        return peer_id_of(key.public_key())

    def name_of(self, peer_id: str | None) -> str | None:
        return next((name for name in self.running if self.peer_id(name) == peer_id), None)

    def head(self, name: str) -> int:
        """The newest round in its ledger; 0: there is none that can be read now."""
        try:
            with open_state(self._folder / name / "state") as state:
                return state.head
        except (ConfigError, LedgerCorrupt):
            return 0

    def newest(self, but: str) -> int:
        """The newest round that any but this one has."""
        return max(self.head(name) for name in self.running if name != but)

    def result(self, last: Child | None) -> Mapping[str, Any]:
        """How the run ended, by the coordinator that led it then. Raises DemoFailed."""
        for child in (last, *self.running.values()):
            path = None if child is None else child.folder / "state" / "result.json"
            if path is not None and path.exists():
                result: Mapping[str, Any] = json.loads(path.read_text())
                return result
        raise DemoFailed("no coordinator has kept how the run ended")

    def _name(self, i: int) -> str:
        return "coordinator" if self.n == 1 else f"coordinator-{i}"

    @property
    def _ticket_file(self) -> Path:
        return self._folder / self._name(0) / "ticket"

    def _first_only(self) -> list[str]:
        return [] if self.n == 1 else ["--seats", str(self.n), "--ticket-file", str(self._ticket_file)]

    def _http(self, is_first: bool) -> list[str]:
        """Each has a page; those of the others are at free ports."""
        http = self._plan.http
        if http is None:
            return []
        args = ["--http", str(http if is_first else http._replace(port=0))]
        args += [] if http.token is None else ["--http-token", http.token]
        return args + [f"--http-host={name}" for name in http.names]
