"""`thinwire coordinator`: record 0 for a new run, then the server until the run ends or is stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compression.errors import ConfigError
from ...coordinator.entry.rules import EntryRules
from ...coordinator.protocol.addresses import HttpAddress, host_of
from ...coordinator.protocol.files import write_aside
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.server import CoordinatorServer
from ...coordinator.state import StateDir
from ...optim.registry import check_changes
from ..config import RunConfig, load_config, parse_config
from ..genesis import make_genesis, public_config
from ..system.folder import folder_of_run
from ..system.output import to_stdout
from ..system.places import refuse_address, refuse_file, refuse_folder, refuse_http
from ..tasks.base import Task, loss_unit_of
from ..tasks.registry import make_task

if TYPE_CHECKING:
    from ...coordinator.observe.page import Page
    from ..system.stopping import Stop

log = logging.getLogger("thinwire.coordinator")

LOOK_EVERY_S = 1.0


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
    linger_s: float = 0.0,
) -> bool:
    """Serves until `linger_s` after the last round is acknowledged, or until `stop` is set; True: the run was
    over. Prints the ticket on stdout.

    Raises ConfigError (configuration, taken port, a state directory in use or of another run), LedgerCorrupt.
    """
    config = load_config(run_file, overrides)
    refuse_file("--ticket-file", ticket_file)
    refuse_address(host, port, announce)
    refuse_http(http)
    folder = state or folder_of_run(config.run.name, "coordinator")
    refuse_folder("--state", folder)
    task = make_task(config.task, import_path, None)
    with StateDir(folder) as state_dir:
        if rotate_token:
            state_dir.rotate_token()
        if ban:
            state_dir.ban(ban)
        server = open_server(
            state_dir,
            config,
            task,
            host=host,
            port=port,
            announce=announce,
            keeps_last_snapshot=linger_s > 0,
        )
        if http is not None:  # by what others reach this machine they may ask for its page, too
            http = http._replace(names=(*http.names, *(host_of(text, port) for text in announce)))
        return asyncio.run(_Serving(server, folder, linger_s).serve(ticket_file, http, stop))


def open_server(state: StateDir, config: RunConfig, task: Task, **where: Any) -> CoordinatorServer:
    """A new run in an empty directory, else the run that is there if it is the same one."""
    where = {"check_strategy": check_changes, "loss_unit": loss_unit_of(task), **where}
    state.save_keep(str(config.run.keep))
    state.save_rules(EntryRules.of(config.admission.mode, config.admission.peers))
    if not state.ledger_path.exists():
        coordinator = peer_id_of(load_or_create(state.key_path).public_key())
        genesis = make_genesis(config, task, coordinator, time.time_ns() // 10**6)
        log.info("new run %s, kept in %s", config.run.name, state.path)
        return CoordinatorServer(state, genesis=genesis.body, blobs=genesis.blobs, **where)
    server = CoordinatorServer(state, **where)
    # As of today: options that the run's thinwire did not have yet are what they are by default.
    recorded = parse_config(server.ledger.genesis.config)
    there, here = (public_config(c, task, recorded).model_dump() for c in (recorded, config))
    differences = _differences(there, here)
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


class _Serving:
    """A coordinator that is served, until some time after its run's end. `folder`: its state."""

    def __init__(self, server: CoordinatorServer, folder: Path, linger_s: float) -> None:
        self._server, self._folder, self._linger_s = server, folder, linger_s
        self._page: Page | None = None
        self._stopped = asyncio.Event()

    async def serve(self, ticket_file: Path | None, http: HttpAddress | None, stop: Stop) -> bool:
        """True: the run was over when it ended. Raises what makes the server fail."""
        loop, server = asyncio.get_running_loop(), self._server
        stop.on_stop.append(lambda: loop.call_soon_threadsafe(self._stopped.set))
        with ExitStack() as stack:
            try:
                if stop.is_set():  # it came while there was nobody to tell
                    return False
                if http is not None:
                    self._serve_page(stack, http)
                await server.start()
                if ticket_file is not None:
                    write_ticket(ticket_file, server.ticket.line())
                    server.on_new_ticket = lambda: write_ticket(ticket_file, server.ticket.line())
                to_stdout(server.ticket.line())
                log.info("the line above is the ticket. On any machine: thinwire join TICKET")
                if server.service.is_over:
                    log.info("this run is over already, since round %d", server.service.head)
                return await self._until_the_end()
            finally:
                await server.stop()

    def _serve_page(self, stack: ExitStack, http: HttpAddress) -> None:
        from ...coordinator.observe.page import serve_coordinator

        serving = serve_coordinator(self._server, asyncio.get_running_loop(), http)
        self._page, port = stack.enter_context(serving)
        self._server.http = http._replace(port=port)
        log.info("the swarm's page: %s (and /metrics, /sd, /healthz)", self._server.http.url())

    async def _until_the_end(self) -> bool:
        """Over and over: a run that is made longer while it is served ends again."""
        while await self._unless_stopped(self._server.run_until_finished(), math.inf):
            write_aside(self._folder / "result.json", json.dumps(self._server.status()).encode())
            self._tell_the_end()
            if not await self._unless_stopped(self._until_longer(), self._linger_s):
                if self._page is not None:
                    self._page.farewell()
                break
        if not self._server.service.is_over:
            head = self._server.ledger.head_round
            log.info("stopped after round %d: the same command goes on from there, nodes wait for it", head)
        return self._server.service.is_over

    async def _unless_stopped(self, work: Coroutine[Any, Any, None], at_most_s: float) -> bool:
        """False: it was stopped, or time was up before. Raises what the work raises."""
        task, leave = asyncio.create_task(work), asyncio.create_task(self._stopped.wait())
        timeout_s = None if math.isinf(at_most_s) else at_most_s
        await asyncio.wait({task, leave}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        leave.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        return False

    async def _until_longer(self) -> None:
        """Somebody may give a finished run more rounds. Raises what makes the server fail."""
        while self._server.service.is_over:
            if self._server.failure is not None:
                raise self._server.failure
            await asyncio.sleep(LOOK_EVERY_S)

    def _tell_the_end(self) -> None:
        head = self._server.ledger.head_round
        next_step = f"thinwire export {self._folder} -o weights, or the same with a node's state folder"
        if self._linger_s <= 0:
            log.info("the run is over after round %d; next: %s", head, next_step)
            return
        until = "Ctrl-C"
        if not math.isinf(self._linger_s):
            until = f"{time.strftime('%H:%M:%S', time.localtime(time.time() + self._linger_s))} or Ctrl-C"
        log.info(
            "the run is over after round %d. Serving it until %s: thinwire export TICKET -o weights "
            "and thinwire join TICKET --save FILE give the weights to anybody; thinwire run %s extend "
            "--rounds N goes on; afterwards: %s. The same command serves it again",
            head,
            until,
            self._folder,
            next_step,
        )


def write_ticket(path: Path, line: str) -> None:
    """Readable by this user alone. Raises ConfigError."""
    try:
        write_aside(path, f"{line}\n".encode(), 0o600)
    except OSError as e:
        raise ConfigError(f"--ticket-file {path}: {e.strerror}") from e
