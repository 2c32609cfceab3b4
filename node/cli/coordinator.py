"""`thinwire coordinator`: record 0 for a new run, then the server until the run ends or is stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError, SwarmUnreachable
from ...coordinator.entry.rules import EntryRules
from ...coordinator.protocol.addresses import HttpAddress, host_of
from ...coordinator.protocol.files import write_aside
from ...coordinator.protocol.identity import load_or_create, peer_id_of, public_key_of
from ...coordinator.protocol.messages import MAX_SEATS, digest_of
from ...coordinator.protocol.p2p import start_p2p
from ...coordinator.seats.beginning import begin
from ...coordinator.seats.naming import Wish
from ...coordinator.seats.plan import SeatPlan
from ...coordinator.seats.recovery import KEY_NAME, recovery_digest
from ...coordinator.seats.ticket import SeatTicket, keep_ticket
from ...coordinator.server import CoordinatorServer
from ...coordinator.serving.fanout import UPLOAD_BYTES_PER_S
from ...coordinator.state import StateDir
from ..config import RunConfig, load_config
from ..founding.founder import Founded, Founder
from ..links.connecting.begun import Begun
from ..states.opening import open_state
from ..system.folder import folder_of_run
from ..system.output import to_stdout
from ..system.places import refuse_address, refuse_file, refuse_folder, refuse_http

if TYPE_CHECKING:
    from ...coordinator.observe.page import Page
    from ..system.stopping import Stop

log = logging.getLogger("thinwire.coordinator")

LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class SeatOptions:
    """Of a coordinator that is one of several, as on the command line."""

    n_seats: int | None = None
    replica: str | None = None
    replace: str | None = None
    keeps_payloads: bool = True
    restored: bool = False
    recover: bool = False
    recovery_key: Path | None = None
    recover_wait_s: float = 30.0
    ticket_file: Path | None = None
    """Where the seat ticket is written, too."""

    def refuse(self) -> None:
        """Raises ConfigError for what cannot be meant."""
        if self.n_seats is not None and not 1 <= self.n_seats <= MAX_SEATS:
            raise ConfigError(f"--seats: between 1 and {MAX_SEATS}")
        if self.replace is not None:
            public_key_of(self.replace)
        if not self.keeps_payloads:
            log.warning(
                "--blobs leader: the payloads of the last rounds are lost with the disk of the coordinator "
                "that leads; who joins then needs a snapshot of the swarm's"
            )
        if self.n_seats is not None and self.n_seats % 2 == 0:
            log.warning(
                "--seats %d: an even number is no better than one less%s",
                self.n_seats,
                ": with two, the loss of either stops the run. Take 3" if self.n_seats == 2 else "",
            )

    @property
    def wish(self) -> Wish:
        """Of the committee."""
        return Wish(self.n_seats or 0, self.replace or "")

    @property
    def is_seat(self) -> bool:
        """Whether this coordinator is to be one of several; else its folder says so."""
        is_asked = self.replica is not None or self.replace is not None or not self.keeps_payloads
        return is_asked or (self.n_seats or 0) > 1


def coordinate(
    *,
    run_file: Path | None,
    state: Path | None,
    host: str,
    port: int,
    announce: tuple[str, ...],
    overrides: Mapping[str, Any],
    founder: Founder,
    ticket_file: Path | None,
    rotate_token: bool,
    ban: Sequence[str],
    http: HttpAddress | None,
    stop: Stop,
    linger_s: float = 0.0,
    seats: SeatOptions = SeatOptions(),
    upload_bytes_per_s: float = UPLOAD_BYTES_PER_S,
) -> bool:
    """Serves until `linger_s` after the last round is acknowledged, or until `stop` is set; True: the run was
    over. Prints the ticket on stdout. `run_file`: None for a replica, and for a run that `state` has.
    `upload_bytes_per_s`: what this machine's line sends.

    Raises ConfigError (configuration, taken port, a state directory in use or of another run), LedgerCorrupt.
    """
    seats.refuse()
    config = None if run_file is None else load_config(run_file, overrides)
    ticket = None if seats.replica is None else SeatTicket.read(seats.replica)
    refuse_file("--ticket-file", ticket_file)
    refuse_file("--seat-ticket-file", seats.ticket_file)
    refuse_address(host, port, announce)
    refuse_http(http)
    folder = state or _default_folder(ticket)
    refuse_folder("--state", folder)
    with StateDir(folder) as state_dir:
        if seats.restored:
            state_dir.forget_votes()
        if ticket is not None:
            port = _begin(state_dir, ticket, host, port, announce, stop) or port
            if stop.is_set():
                return False
        if rotate_token:
            state_dir.rotate_token()
        if ban:
            state_dir.ban(ban)
        where: dict[str, Any] = {"host": host, "port": port, "announce": announce}
        where["keeps_last_snapshot"], where["upload_bytes_per_s"] = linger_s > 0, upload_bytes_per_s
        if seats.is_seat:
            plan = SeatPlan.of(folder, seats.wish)
            where["seats"] = replace(plan, waits_for_payloads=seats.keeps_payloads)
        if http is not None:  # by what others reach this machine they may ask for its page, too
            http = http._replace(names=(*http.names, *(host_of(text, port) for text in announce)))
        recovery = None
        if seats.recover:
            recovery = _recovery_key(seats.recovery_key or folder / KEY_NAME), seats.recover_wait_s

        async def open_and_serve() -> bool:
            async with _opened(state_dir, config, founder, **where) as server:
                serving = _Serving(server, folder, linger_s, recovery, seats.ticket_file)
                return await serving.serve(ticket_file, http, stop)

        try:
            return asyncio.run(open_and_serve())
        except SwarmUnreachable:
            if stop.is_set():
                return False
            raise


@asynccontextmanager
async def _opened(
    state: StateDir, config: RunConfig | None, founder: Founder, **where: Any
) -> AsyncIterator[CoordinatorServer]:
    """`config`: None, whatever the run's is. Raises ConfigError, LedgerCorrupt and what `founder` raises."""
    if config is None:
        yield _open_folder(state, founder, **where)
        return
    if state.ledger_path.exists():
        yield open_server(state, config, founder, **where)
        return
    address = {key: where[key] for key in ("host", "port", "announce")}
    address["port"] = address["port"] or state.port() or 0
    begun = Begun(start_p2p, load_or_create(state.key_path), **address)
    try:
        founded = await asyncio.to_thread(_found, state, config, founder)
        yield open_server(state, config, founder, founded, start_transport=begun, **where)
    finally:
        await begun.close()


def _default_folder(ticket: SeatTicket | None) -> Path:
    if ticket is not None:
        return folder_of_run(f"run-{ticket.run_id.hex()[:12]}", "coordinator")
    raise ConfigError("name a run file, --state with the folder of a run, or --replica with a seat ticket")


def _begin(
    state: StateDir, ticket: SeatTicket, host: str, port: int, announce: Sequence[str], stop: Stop
) -> int | None:
    """A folder of a seat that has nothing yet; returns the port that it listened on."""
    if state.ledger_path.exists():
        return None
    key = load_or_create(state.key_path)
    state.save_token(ticket.token)
    keep_ticket(state.path, ticket)

    async def begin_unless_stopped() -> int | None:
        loop, leave = asyncio.get_running_loop(), asyncio.Event()
        work = asyncio.create_task(
            begin(state.ledger_path, ticket, key, start_p2p, host=host, port=port, announce=announce)
        )
        stopped = asyncio.create_task(leave.wait())

        def tell() -> None:
            loop.call_soon_threadsafe(leave.set)

        stop.on_stop.append(tell)
        try:
            if stop.is_set():
                leave.set()
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.on_stop.remove(tell)  # the loop ends
        stopped.cancel()
        if work.done():
            return work.result()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return None

    return asyncio.run(begin_unless_stopped())


def _recovery_key(path: Path) -> Ed25519PrivateKey:
    if not path.exists():
        raise ConfigError(
            f"{path}: the recovery key is not there. The run's first coordinator wrote it into its state "
            f"folder; name the file with --recovery-key"
        )
    return load_or_create(path)


def _open_folder(state: StateDir, founder: Founder, **where: Any) -> CoordinatorServer:
    """The run that is there, whatever its configuration. Raises ConfigError."""
    if not state.ledger_path.exists():
        raise ConfigError(f"{state.path} has no run yet: name its run file, or a seat ticket with --replica")
    server = CoordinatorServer(state, check_strategy=founder.check, **where)
    log.info("going on after round %d of the run in %s", server.ledger.head_round, state.path)
    return server


def open_server(
    state: StateDir, config: RunConfig, founder: Founder, founded: Founded | None = None, **where: Any
) -> CoordinatorServer:
    """A new run in an empty directory, else the run that is there if it is the same one. `founded`: the new
    one, if it is there already. Raises what `founder` raises."""
    where = {"check_strategy": founder.check, **where}
    state.save_keep(str(config.run.keep))
    asked = EntryRules.of(config.admission.mode, config.admission.peers)
    state.start_with_rules(asked)
    if (rules := state.rules()) != asked:
        said = f"[admission] of the run file ({asked.mode}) is what it was at the last start"
        log.info("%s: who comes in stays as thinwire run has said since, %s", said, rules.mode)
    if not state.ledger_path.exists():
        founded = founded or _found(state, config, founder)
        log.info("new run %s, kept in %s", config.run.name, state.path)
        server = CoordinatorServer(state, genesis=founded.body, loss_unit=founded.loss_unit, **where)
        if founder.name is not None:
            digest = _digest(server.ledger.run_id, config, founder.name)
            state.save_run_file(digest, founded.loss_unit)
        return server
    server = CoordinatorServer(state, loss_unit=_compared(state, config, founder), **where)
    log.info("going on with run %s after round %d", config.run.name, server.ledger.head_round)
    return server


def _found(state: StateDir, config: RunConfig, founder: Founder) -> Founded:
    coordinator = peer_id_of(load_or_create(state.key_path).public_key())
    return founder.found(config, coordinator, recovery_digest(state.path), state.blobs_path)


def _compared(state: StateDir, config: RunConfig, founder: Founder) -> str:
    """The unit of the run's losses. Raises ConfigError: its file says something else than record 0."""
    with open_state(state.path) as run:
        recorded, run_id = run.genesis.config, run.run_id
    digest = None if founder.name is None else _digest(run_id, config, founder.name)
    known = None if digest is None else state.loss_unit_of(digest)
    if known is not None:
        return known
    compared = founder.compare(config, recorded)
    if compared.differences:
        raise ConfigError(
            f"{state.path} holds a run with another configuration: {'; '.join(compared.differences)}. "
            f"Record 0 cannot change: name another --state for a new run. thinwire run {state.path} changes "
            f"what can change in a run: its rounds, learning rate and schedule."
        )
    if digest is not None:
        state.save_run_file(digest, compared.loss_unit)
    return compared.loss_unit


def _digest(run_id: bytes, config: RunConfig, task: str) -> bytes:
    """Of what a run file says of a run, and whose task it is: the same is not compared again."""
    said = [run_id.hex(), config.to_json(), config.admission.model_dump_json(), task]
    return digest_of(json.dumps(said).encode())


class _Serving:
    """A coordinator that is served, until some time after its run's end. `folder`: its state; `recovery`: the
    run's recovery key, and for how long to look for newer rounds before it is used."""

    def __init__(
        self,
        server: CoordinatorServer,
        folder: Path,
        linger_s: float,
        recovery: tuple[Ed25519PrivateKey, float] | None = None,
        seat_ticket_file: Path | None = None,
    ) -> None:
        self._server, self._folder, self._linger_s, self._recovery = server, folder, linger_s, recovery
        self._seat_ticket_file = seat_ticket_file
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
                if self._recovery is not None:
                    await self._unless_stopped(server.recover(*self._recovery), math.inf)
                server.on_new_ticket = lambda: self._tell_new_ticket(ticket_file)
                if server.is_seat:
                    self._tell_ticket(ticket_file)
                    log.info("the line above is the ticket. On any machine: thinwire join TICKET")
                else:
                    log.info("this coordinator looks on until it is up to date and the others name it")
                if server.seat_ticket is not None:
                    log.info(
                        "for another coordinator: carry the secret file %s to its machine; there: thinwire "
                        "coordinator --replica FILE",
                        server.seat_ticket,
                    )
                if server.is_over:
                    log.info("this run is over already, since round %d", server.head)
                return await self._until_the_end()
            finally:
                await server.stop()

    def _tell_ticket(self, ticket_file: Path | None) -> None:
        """Now, and when it is another one: all coordinators stand in it."""
        line = self._server.ticket.line()
        if ticket_file is not None:
            write_ticket(ticket_file, line)
        kept = self._server.seat_ticket
        if self._seat_ticket_file is not None and kept is not None and kept.exists():
            write_ticket(self._seat_ticket_file, kept.read_text().strip(), "--seat-ticket-file")
        to_stdout(line)

    def _tell_new_ticket(self, ticket_file: Path | None) -> None:
        """While it serves: a file that cannot be written ends nothing."""
        try:
            self._tell_ticket(ticket_file)
        except ConfigError as e:
            log.error("another ticket counts now, see thinwire status: %s", e)

    def _serve_page(self, stack: ExitStack, http: HttpAddress) -> None:
        from ...coordinator.observe.page import serve_coordinator

        serving = serve_coordinator(self._server, asyncio.get_running_loop(), http)
        self._page, port = stack.enter_context(serving)
        self._server.http = http._replace(port=port)
        log.info("the swarm's page: %s (and /metrics, /sd, /healthz)", self._server.http.url())

    async def _until_the_end(self) -> bool:
        """Over and over: a run that is made longer while it is served ends again."""
        while await self._unless_stopped(self._server.run_until_finished(), math.inf):
            result = self._folder / "result.json"
            try:
                write_aside(result, json.dumps(self._server.status()).encode())
            except OSError as e:
                log.error("%s cannot be written: %s", result, e.strerror)
            self._tell_the_end()
            if not await self._unless_stopped(self._until_longer(self._server.head), self._linger_s):
                if self._page is not None:
                    self._page.farewell()
                break
        if not self._server.is_over:
            head = self._server.ledger.head_round
            log.info("stopped after round %d: the same command goes on from there, nodes wait for it", head)
        return self._server.is_over

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

    async def _until_longer(self, head: int) -> None:
        """Somebody may give a run that is finished at `head` more rounds; a few may be over at the next look.
        Raises what makes the server fail."""
        while self._server.is_over and self._server.head == head:
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


def write_ticket(path: Path, line: str, option: str = "--ticket-file") -> None:
    """Readable by this user alone. Raises ConfigError."""
    try:
        write_aside(path, f"{line}\n".encode(), 0o600)
    except OSError as e:
        raise ConfigError(f"{option} {path}: {e.strerror}") from e
