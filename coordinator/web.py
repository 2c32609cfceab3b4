"""HTTP for people and scrapers: a starlette application on uvicorn, in a thread with its own event loop.

Neither a scrape nor a browser ever runs in the loop that serves the swarm, or in the thread that trains.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.addresses import HttpAddress
from thinwire.coordinator.metrics import Shown

log = logging.getLogger("thinwire.http")

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""What a container's supervisor asks for knows no token."""

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
        middleware.insert(0, Middleware(_OnlyWithToken, token=address.token))
    elif not is_loopback(address.host):
        log.warning("--http %s: whoever reaches this port may read; --http-token protects it", address)
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=list(routes), middleware=middleware),
            loop="asyncio",
            http="h11",
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


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


class _OnlyWithToken:
    """Whoever shows it as `Authorization: Bearer TOKEN` may come in."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            shown = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(shown, self._expected):
                headers = {"www-authenticate": "Bearer"}
                await PlainTextResponse("a token is needed\n", 401, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)
