"""A coordinator's seat as a process of its own beside a node: started with it, watched, and stopped with it.

A run whose coordinators all live beside nodes needs no machine of its own for them. The seat shares nothing
with the node but the machine: either may crash, and the other goes on.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...compression.errors import ConfigError
from ...coordinator.protocol.ticket import Ticket
from ...coordinator.seats.ticket import FILE_NAME, SeatTicket, keep_ticket
from ..system.command_name import name_for_children
from ..system.folder import default_folder
from ..system.logs import PREFIX_VARIABLE
from ..system.places import refuse_address
from ..system.processes import PARENT_VARIABLE

if TYPE_CHECKING:
    from ..system.stopping import Stop

log = logging.getLogger("thinwire.node")

FIRST_PAUSE_S: Final = 1.0
LAST_PAUSE_S: Final = 60.0
STEADY_S: Final = 60.0
"""One that has run for so long before it broke is started again at once."""

END_S: Final = 20.0
"""From SIGTERM until it is killed."""

SEE_OFF_S: Final = 90.0
"""After the last round it stays for others that are not done, for so long at most."""

HOPELESS: Final = (2, 4)
"""Exit codes of what would fail again: usage and configuration, another protocol."""

_LOOK_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Coordinate:
    """What the user of a node says of a seat beside it. `seat_ticket`: a file or the line; `port` 0: a free
    one, which it keeps; `announce`: addresses that others reach it by."""

    seat_ticket: str
    host: str = "0.0.0.0"
    port: int = 0
    announce: tuple[str, ...] = ()


def seat_command(ticket: Ticket, asked: Coordinate, node_state: Path | None) -> list[str]:
    """Arguments of `thinwire`. Makes the seat's folder beside the node's, one for each run, and keeps the
    seat ticket there. Raises ConfigError."""
    seat_ticket = SeatTicket.read(asked.seat_ticket)
    if seat_ticket.run_id != ticket.run_id:
        raise ConfigError("--coordinate: this seat ticket is of another run than the ticket")
    refuse_address(asked.host, asked.port, asked.announce)
    home = default_folder(os.environ) if node_state is None else _beside(node_state)
    folder = home / f"run-{ticket.run_id.hex()[:12]}-coordinator"
    if not (folder / "ledger.db").exists():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{folder} cannot be made: {e.strerror}") from e
        keep_ticket(folder, seat_ticket)
    args = ["coordinator", "--replica", str(folder / FILE_NAME), "--state", str(folder), "--linger", "0"]
    args += ["--host", asked.host, "--port", str(asked.port)]
    return [*args, *(f"--announce={address}" for address in asked.announce)]


def _beside(node_state: Path) -> Path:
    whole = node_state.absolute()
    return whole.with_name(f"{whole.name}-seat")


@contextmanager
def seat_beside(args: Sequence[str]) -> Iterator[Beside]:
    """`thinwire ARGS` meanwhile. It ends with the `with`, and with this process however that ends."""
    argv = [sys.executable, "-m", "thinwire.node.cli.main", *args]
    beside = Beside(argv, {**os.environ, **name_for_children(), PREFIX_VARIABLE: "coordinator: "})
    try:
        yield beside
    finally:
        beside.close()


class Beside:
    """One process that is kept running: started again when it breaks, after a pause that grows."""

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self._argv, self._environ = list(argv), {**environ, PARENT_VARIABLE: str(os.getpid())}
        self._first_pause_s = first_pause_s
        self._closing = threading.Event()
        self._starting = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="seat", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether it is there, or is about to be."""
        return self._thread.is_alive()

    def see_off(self, stop: Stop) -> None:
        """The run is over: it ends by itself once nobody needs it, which is waited for."""
        deadline_s = time.monotonic() + SEE_OFF_S
        if self.is_running:
            log.info(
                "the coordinator beside this node stays until the others are done, %.0f s at most", SEE_OFF_S
            )
        while self.is_running and not stop.is_set() and time.monotonic() < deadline_s:
            self._thread.join(_LOOK_S)

    def close(self) -> None:
        """SIGTERM, after a while SIGKILL. May be called twice."""
        with self._starting:
            self._closing.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def _keep(self) -> None:
        pause_s = self._first_pause_s
        while (process := self._start()) is not None:
            began_s = time.monotonic()
            code = process.wait()
            if code == 0 or self._closing.is_set():
                return
            if code in HOPELESS:
                log.error("the coordinator beside this node cannot go on: see above. The node trains on")
                return
            if time.monotonic() - began_s > STEADY_S:
                pause_s = self._first_pause_s
            log.warning(
                "the coordinator beside this node ended (exit code %d): it is started again in %.0f s",
                code,
                pause_s,
            )
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _start(self) -> subprocess.Popen[bytes] | None:
        """None: it is not wanted any more."""
        with self._starting:
            if self._closing.is_set():
                return None
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # tickets, which are not this node's
                env=self._environ,
                start_new_session=True,  # Ctrl-C reaches the node alone, which ends it after itself
            )
            return self._process
