"""HTTP for people and scrapers: a starlette application on uvicorn, in a thread with its own event loop.

Neither a scrape nor a browser ever runs in the loop that serves the swarm, or in the thread that trains.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import parse_qs

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ...compression.errors import ConfigError
from .addresses import HttpAddress
from .exposition import Shown
from .http.connections import BoundedProtocol, Budgets
from .http.hosts import OPEN_PATHS, OnlyForItsNames, is_loopback

COOKIE_S: Final = 30 * 24 * 3600
_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 27rem; margin: 18vh auto 0; padding: 0 1.25rem }
h1 { font-size: 1.4rem; margin: 0 0 .5rem }
form { display: flex; gap: .5rem; align-items: end; margin-top: 1.25rem }
label { flex: 1; font-weight: 550 }
input, button { font: inherit; padding: .45rem .7rem; border-radius: 7px; border: 1px solid #8088 }
input { display: block; width: 100%; box-sizing: border-box }
button { background: #2463d6; color: #fff; cursor: pointer }
"""
_ASK: Final = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>thinwire</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1>This swarm is protected</h1>
<p>Its token is the one that the coordinator was started with: --http-token, or THINWIRE_HTTP_TOKEN.</p>
<form action="/" method="get">
<label>Token <input name="token" type="password" required autofocus autocomplete="current-password"></label>
<button>Show it</button></form></body></html>
"""
_ASK_CSP: Final = (
    "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; img-src data:; "
    f"style-src 'sha256-{b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
)


class OnlyWithToken:
    """Whoever shows it may come in: as `Authorization: Bearer TOKEN`, or once as /?token=TOKEN, which sets a
    cookie for a browser."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()
        self._bearer = f"Bearer {token}".encode()
        # Ports share a host's cookies; and the cookie must not be the token itself.
        self._name = "thinwire-" + self._derived("name")[:16]
        self._value = self._derived("value")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
        else:
            await self._answer(scope)(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        if hmac.compare_digest(headers.get(b"authorization", b""), self._bearer):
            return not _shows_token(scope)
        cookie = _cookies(headers.get(b"cookie", b"")).get(self._name, "")
        return hmac.compare_digest(cookie.encode(), self._value.encode()) and not _shows_token(scope)

    def _answer(self, scope: Scope) -> Response:
        """To whoever has shown nothing yet, or the token in the address."""
        shown = _shown(scope)
        if shown is not None and hmac.compare_digest(shown.encode(), self._token):
            there = RedirectResponse("/", 303)  # the token is not to stay in the address
            there.set_cookie(self._name, self._value, max_age=COOKIE_S, httponly=True, samesite="lax")
            return there
        headers = {"www-authenticate": "Bearer", "cache-control": "no-store"}
        accepts = dict(scope["headers"]).get(b"accept", b"")
        if scope["path"] == "/" and b"text/html" in accepts:
            return HTMLResponse(_ASK, 401, {**headers, "content-security-policy": _ASK_CSP})
        return PlainTextResponse("a token is needed\n", 401, headers)

    def _derived(self, purpose: str) -> str:
        return hmac.new(self._token, f"thinwire {purpose}".encode(), hashlib.sha256).hexdigest()


def _shown(scope: Scope) -> str | None:
    """The token in the address of the page."""
    if scope["path"] != "/" or len(scope["query_string"]) > 1000:
        return None
    values = parse_qs(scope["query_string"].decode("latin-1")).get("token")
    return values[0] if values else None


def _shows_token(scope: Scope) -> bool:
    return _shown(scope) is not None


def _cookies(header: bytes) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header.decode("latin-1")).items()}
    except CookieError:
        return {}


log = logging.getLogger("thinwire.http")

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
    # Who shows a token is no page from elsewhere: it may ask by any name.
    guard = Middleware(OnlyForItsNames, address=address)
    if address.token is not None:
        guard = Middleware(OnlyWithToken, token=address.token)
    middleware = [Middleware(Budgets), guard, Middleware(GZipMiddleware, minimum_size=1000)]
    if address.token is None and not is_loopback(address.host):
        log.warning("--http %s: whoever reaches this port may read; --http-token protects it", address)
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=list(routes), middleware=middleware),
            loop="asyncio",
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
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
