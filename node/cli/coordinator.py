"""`thinwire coordinator`: record 0 for a new run, then the server until the run ends or is stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compression.errors import ConfigError
from ...coordinator.protocol.addresses import HttpAddress
from ...coordinator.protocol.files import write_aside
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.server import CoordinatorServer
from ...coordinator.state import StateDir
from ...optim.registry import check_changes
from ..config import RunConfig, load_config, parse_config
from ..genesis import make_genesis, public_config
from ..tasks.base import Task
from ..tasks.registry import make_task

if TYPE_CHECKING:
    from ...coordinator.observe.page import Page
    from ..system.stopping import Stop

log = logging.getLogger("thinwire.coordinator")


def coordinate(
    *,
    run_file: Path,
    state: Path | None,
    host: str,
    port: int,
    announce: tuple[str, ...],
    overrides: Mapping[str, Any],
    import_path: str | None,
    ticket_file: Path | None,
    rotate_token: bool,
    ban: Sequence[str],
    http: HttpAddress | None,
    stop: Stop,
) -> None:
    """Serves until the last round is acknowledged or `stop` is set. Prints the ticket on stdout.

    Raises ConfigError (configuration, taken port, a state directory in use or of another run), LedgerCorrupt.
    """
    if ticket_file is not None and not ticket_file.absolute().parent.is_dir():
        raise ConfigError(f"--ticket-file {ticket_file}: there is no folder {ticket_file.parent}")
    config = load_config(run_file, overrides)
    task = make_task(config.task, import_path, None)
    folder = state or Path(f"{config.run.name}-coordinator")
    with StateDir(folder) as state_dir:
        if rotate_token:
            state_dir.rotate_token()
        if ban:
            state_dir.ban(ban)
        server = open_server(state_dir, config, task, host=host, port=port, announce=announce)
        asyncio.run(_serve(server, folder, ticket_file, http, stop))


def open_server(state: StateDir, config: RunConfig, task: Task, **where: Any) -> CoordinatorServer:
    """A new run in an empty directory, else the run that is there if it is the same one."""
    where = {"check_strategy": check_changes, **where}
    if not state.ledger_path.exists():
        coordinator = peer_id_of(load_or_create(state.key_path).public_key())
        genesis = make_genesis(config, task, coordinator, time.time_ns() // 10**6)
        log.info("new run %s, kept in %s", config.run.name, state.path)
        return CoordinatorServer(state, genesis=genesis.body, blobs=genesis.blobs, **where)
    server = CoordinatorServer(state, **where)
    # As of today: options that the run's thinwire did not have yet are what they are by default.
    there = public_config(parse_config(server.ledger.genesis.config), task).model_dump()
    differences = _differences(there, public_config(config, task).model_dump())
    if differences:
        server.ledger.close()
        raise ConfigError(
            f"{state.path} holds a run with another configuration: {'; '.join(differences)}. "
            f"Record 0 cannot change: name another --state for a new run. thinwire run {state.path} changes "
            f"what can change in a run: its rounds, learning rate and schedule."
        )
    log.info("going on with run %s after round %d", config.run.name, server.ledger.head_round)
    return server


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {old!r} there, {new!r} here")
    return found


async def _serve(
    server: CoordinatorServer, folder: Path, ticket_file: Path | None, http: HttpAddress | None, stop: Stop
) -> None:
    loop = asyncio.get_running_loop()
    page: Page | None = None
    stopped = asyncio.Event()
    stop.on_stop.append(lambda: loop.call_soon_threadsafe(stopped.set))
    with ExitStack() as stack:
        try:
            if stop.is_set():  # it came while there was nobody to tell
                return
            if http is not None:
                from ...coordinator.observe.page import serve_coordinator

                page, port = stack.enter_context(serve_coordinator(server, loop, http))
                server.http = http._replace(port=port)
                log.info("the swarm's page: %s (and /metrics, /sd, /healthz)", server.http.url())
            await server.start()
            if ticket_file is not None:
                write_ticket(ticket_file, server.ticket.line())
            print(server.ticket.line(), flush=True)  # noqa: T201 - data goes to stdout
            log.info("the line above is the ticket. On any machine: thinwire join TICKET")
            finished = asyncio.create_task(server.run_until_finished())
            leave = asyncio.create_task(stopped.wait())
            await asyncio.wait({finished, leave}, return_when=asyncio.FIRST_COMPLETED)
            leave.cancel()
            if finished.done():
                finished.result()
                if page is not None:
                    page.farewell()
                write_aside(folder / "result.json", json.dumps(server.status()).encode())
                log.info("the run is over after round %d", server.ledger.head_round)
            finished.cancel()
        finally:
            await server.stop()


def write_ticket(path: Path, line: str) -> None:
    """Readable by this user alone. Raises ConfigError."""
    try:
        write_aside(path, f"{line}\n".encode(), 0o600)
    except OSError as e:
        raise ConfigError(f"--ticket-file {path}: {e.strerror}") from e
