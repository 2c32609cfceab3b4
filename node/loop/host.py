"""A coordinator for a model of one's own, in a thread of this process: no task file, no import path."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from ...coordinator.server import CoordinatorServer
from ...coordinator.server_thread import ServerThread
from ...coordinator.state import StateDir
from ...optim.base import canonical_name
from ..cli.arguments import http_address
from ..cli.coordinator import open_server, write_ticket
from ..config import RunConfig, load_config
from ..founding.here import Here
from ..genesis import base_bytes, check_layout, in_dtype, layout_of
from ..tasks.buffers import persistent_buffers
from .task import LoopRun

log = logging.getLogger("thinwire.coordinator")


class Host:
    """The coordinator of a run, from entering to leaving the context. `ticket`: the line that lets a machine
    join. Leaving a run that is not over stops it: the same call goes on with it, and nodes wait for that."""

    def __init__(self, thread: ServerThread, ticket_file: Path | None, http: str | None) -> None:
        self._thread, self._ticket_file = thread, ticket_file
        self._http = http_address(http, None)
        self._stack = ExitStack()
        self._was_over = False
        self.ticket = ""
        self.url: str | None = None
        """Of the swarm's page, if it is served."""

    def __enter__(self) -> Self:
        """Raises ConfigError (a port or a folder that is taken, another run in it), LedgerCorrupt and
        Incompatible."""
        with ExitStack() as stack:
            stack.enter_context(self._thread)
            self._was_over = self._is_over()
            if self._http is not None:
                self._serve_page(stack)
            self.ticket = self._thread.ticket.line()
            if self._ticket_file is not None:
                write_ticket(self._ticket_file, self.ticket)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Where nothing went wrong, nodes hear of the last round before: that takes a minute at most."""
        with self._stack:
            if error is None and self._is_over() and not self._was_over:
                self.wait()

    def _is_over(self) -> bool:
        return bool(self.status()["state"] == "finished")

    def status(self) -> dict[str, Any]:
        """What `thinwire status --json` says."""
        return self._thread.status()

    def wait(self) -> None:
        """Until the run is over and its nodes know it. Raises what made the coordinator fail."""
        server = self._thread.server
        asyncio.run_coroutine_threadsafe(server.run_until_finished(), self._thread.loop).result()

    def _serve_page(self, stack: ExitStack) -> None:
        from ...coordinator.observe.page import serve_coordinator

        assert self._http is not None
        serving = serve_coordinator(self._thread.server, self._thread.loop, self._http)
        _, port = stack.enter_context(serving)
        address = self._thread.server.http = self._http._replace(port=port)
        self.url = address.url()


def host(
    model: nn.Module,
    run: Path | str | Mapping[str, Any] | None = None,
    *,
    state: Path | str,
    evaluated: bool = False,
    host: str = "0.0.0.0",
    port: int = 0,
    announce: Sequence[str] = (),
    ticket_file: Path | str | None = None,
    http: str | None = None,
) -> Host:
    """A run of `model`, which begins with the values that its parameters have.

    `run`: a run file, or its keys: {"run.rounds": 500, "strategy": {"name": "diloco"}}; a task is not among
    them. `state`: the folder of ledger, key and payloads; one that has a run goes on with it, if it is the
    same (then the values of `model` do not matter). `evaluated`: nodes measure a held-out loss, with what
    they give to `join(evaluate=...)`. The other arguments are those of `thinwire coordinator`.

    Raises ConfigError, here and on entering.
    """
    where = {"host": host, "port": port, "announce": tuple(announce)}
    make = partial(_open, _config(run), model, evaluated, where)
    file = None if ticket_file is None else Path(ticket_file)
    return Host(ServerThread(Path(state), make=make), file, http)


def _config(run: Path | str | Mapping[str, Any] | None) -> RunConfig:
    """Raises ConfigError."""
    if isinstance(run, Mapping) or run is None:
        keys = dict(run or {})
        return load_config(None, {**keys, "task.name": "custom"})
    return load_config(Path(run), {"task.name": "custom"})


def _open(
    config: RunConfig, model: nn.Module, evaluated: bool, where: Mapping[str, Any], state: StateDir
) -> CoordinatorServer:
    """In the server's loop. Raises ConfigError, LedgerCorrupt and Incompatible."""
    task = LoopRun(model, evaluated=evaluated)
    if state.ledger_path.exists():
        server = open_server(state, config, Here(task), **where)
        try:
            check_layout(server.ledger.genesis, layout_of(in_dtype(task.model(), config), task))
        except BaseException:
            server.ledger.close()
            raise
        return server
    with tempfile.TemporaryDirectory(prefix="thinwire-base-") as folder:
        base = Path(folder) / "base.safetensors"
        named = {canonical_name(name): p.detach().cpu() for name, p in model.named_parameters()}
        base.write_bytes(base_bytes({**named, **{n: b.cpu() for n, b in persistent_buffers(model)}}))
        with_base = config.model_copy(update={"run": config.run.model_copy(update={"base": str(base)})})
        return open_server(state, with_base, Here(task), **where)
