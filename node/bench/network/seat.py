"""A coordinator of `bench round --seats` in a process of its own, as they are where there are several."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ....compression.errors import ConfigError
from ....coordinator.protocol.identity import load_or_create, peer_id_of
from ....coordinator.protocol.p2p import start_p2p
from ....coordinator.protocol.ticket import Ticket
from ....coordinator.protocol.transport import Transport
from ....coordinator.seats.beginning import begin
from ....coordinator.seats.naming import Wish
from ....coordinator.seats.plan import SeatPlan
from ....coordinator.seats.ticket import SeatTicket, keep_ticket
from ....coordinator.server import CoordinatorServer
from ....coordinator.server_thread import ServerThread
from ....coordinator.state import StateDir
from ...system.output import to_stdout
from ..genesis import genesis_of


class SeatProcess:
    """Serves from entering to leaving the context: on `port`, which others reach as `door`. `seat_ticket`: of
    the seat that founded the run; None: this one does, for so many peers and rounds."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        door: int,
        n_seats: int,
        n_peers: int,
        n_rounds: int,
        seat_ticket: str | None,
    ) -> None:
        said = {key: value for key, value in locals().items() if key not in ("self", "folder")}
        self._told = json.dumps({"folder": str(folder), **said})
        self._process: subprocess.Popen[str] | None = None
        self.seat_ticket = ""
        """Where the ticket for other seats is; "": it orders the run alone."""

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", __name__, self._told]
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.seat_ticket = self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()  # the end of its input ends it

    def ticket(self) -> Ticket:
        """As nodes get it now. Raises ConfigError: it is not there any more."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Ticket.parse(self._line())

    def _line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError("a coordinator of the benchmark has ended early")
        return line.strip()


class _Served:
    """In that process; the arguments are those above."""

    def __init__(self, folder: str, **told: Any) -> None:
        self._folder, self._told = Path(folder), told

    def serve(self) -> None:
        """A line with the ticket for seats, and the run's for each line of the input, until it ends."""
        with ServerThread(self._folder, make=self._make) as thread:
            to_stdout(str(thread.call(lambda server: server.seat_ticket) or ""))
            while sys.stdin.readline():
                to_stdout(thread.call(lambda server: server.ticket).line())

    def _make(self, state: StateDir) -> CoordinatorServer:
        told, n_seats, genesis = self._told, self._told["n_seats"], None
        key = load_or_create(state.key_path)
        if told["seat_ticket"] is None:
            genesis = genesis_of(peer_id_of(key.public_key()), told["n_peers"], told["n_rounds"])
        else:
            ticket = SeatTicket.read(told["seat_ticket"])
            state.save_token(ticket.token)
            keep_ticket(state.path, ticket)
            work = begin(state.ledger_path, ticket, key, start_p2p, host="127.0.0.1", port=0, announce=())
            with ThreadPoolExecutor(1) as pool:  # in a loop of its own
                pool.submit(asyncio.run, work).result()
        return CoordinatorServer(
            state,
            genesis=genesis,
            host="127.0.0.1",
            port=told["port"],
            start_transport=self._behind_the_door,
            seats=None if n_seats == 1 else SeatPlan.of(self._folder, Wish(n_seats)),
        )

    async def _behind_the_door(self, *args: Any, **where: Any) -> Transport:
        """Nobody is told where it listens."""
        transport = await start_p2p(*args, **where)
        transport.addresses = (f"/ip4/127.0.0.1/tcp/{self._told['door']}",)
        return transport


if __name__ == "__main__":
    _Served(**json.loads(sys.argv[1])).serve()
