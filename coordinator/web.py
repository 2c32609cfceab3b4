"""HTTP for people and scrapers: a starlette application on uvicorn, in a thread with its own event loop.

Neither a scrape nor a browser ever runs in the loop that serves the swarm, or in the thread that trains.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.access import OnlyWithToken, is_loopback
from thinwire.coordinator.addresses import HttpAddress
from thinwire.coordinator.metrics import Shown

log = logging.getLogger("thinwire.http")

_MAX_CONNECTIONS: Final = 256
_END_S: Final = 5.0


def metrics_routes(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> list[BaseRoute]:
    """/metrics; /healthz (this process answers) and /readyz (it does what it is there for)."""

    def metrics(request: Request) -> Response:  # not a coroutine: a scrape has a thread of its own
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(Shown(registry)), headers={"content-type": content_type})

    async def healthz(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_request: Request) -> Response:
        return PlainTextResponse("ready\n") if is_ready() else PlainTextResponse("not ready\n", 503)

    return [Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)]


@contextmanager
def serve_http(routes: Sequence[BaseRoute], address: HttpAddress) -> Iterator[int]:
    """Serves meanwhile; gives the port. Raises ConfigError for an address that cannot be listened on."""
    listening = _listen(address)
    port = int(listening.getsockname()[1])
    middleware = [Middleware(GZipMiddleware, minimum_size=1000)]
    if address.token is not None:
        middleware.insert(0, Middleware(OnlyWithToken, token=address.token))
    elif not is_loopback(address.host):
        log.warning("--http %s: whoever reaches this port may read; --http-token protects it", address)
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=list(routes), middleware=middleware),
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(_END_S)
        listening.close()


def _listen(address: HttpAddress) -> socket.socket:
    """Connections are taken from now on, and answered once the server runs."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except OSError as e:
        why = (e.strerror or str(e)).split(" (while")[0]
        raise ConfigError(
            f"--http {address}: {why}; choose another port, or an address of this machine"
        ) from e


class _Protocol(H11Protocol):
    """Lets an application cut the connection that it answers: `scope["state"]["abort"]`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state: dict[str, Any] = {**self.app_state, "abort": transport.abort}
