"""The swarm's own page: static files, what they show live, and the line that lets a machine join.

Read-only. Whoever may see the page may see how the run goes; the ticket lets in, so it is for those who have
shown the token, or sit at this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from blake3 import blake3
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..protocol.addresses import HttpAddress
from ..protocol.http.hosts import is_loopback
from ..protocol.web import serve_http
from ..server import CoordinatorServer
from .gateway import coordinator_routes
from .live import Live, Seen

T = TypeVar("T")

FOLDER: Final = Path(__file__).parent / "static"
LOOK_TIMEOUT_S: Final = 10.0

_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".txt": "text/plain"}
_PROXIES: Final = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
"""Who is asked for by others is not at this machine, wherever the request comes from."""

_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Page:
    """Of one run. `address`: where it is served; `loop`: the coordinator's."""

    def __init__(
        self, server: CoordinatorServer, loop: asyncio.AbstractEventLoop, address: HttpAddress
    ) -> None:
        self._server, self._loop, self._has_token = server, loop, address.token is not None
        self._is_local = is_loopback(address.host)
        self.live = Live(self._look)

    def routes(self) -> list[BaseRoute]:
        apps: dict[str, ASGIApp] = {"/ticket": self._ticket, "/events": self.live}
        for path in sorted(FOLDER.iterdir()):
            apps["/" if path.name == "index.html" else f"/static/{path.name}"] = _File(path)
        return [Route(path, _ForReading(app)) for path, app in apps.items()]

    def farewell(self) -> None:
        """The run is over: everybody who watches sees how it ended. Called in the coordinator's loop."""
        now, trend = self._server.look(0)
        self.live.end(("points", trend), ("now", now))

    async def _look(self, since: int) -> Seen:
        return await self._ask(lambda server: server.look(since))

    async def _ask(self, what: Callable[[CoordinatorServer], T]) -> T:
        """In the coordinator's loop."""

        async def ask() -> T:
            return what(self._server)

        async with asyncio.timeout(LOOK_TIMEOUT_S):
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(ask(), self._loop))

    async def _ticket(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket, why = None, ""
        is_passed_on = not _PROXIES.isdisjoint(name for name, _ in scope["headers"])
        if not self._has_token and (is_passed_on or not self._is_local):
            why = "The ticket is shown on the coordinator's machine, or to those who know its --http-token."
        else:
            ticket = await self._ask(lambda server: server.ticket.line() if server.is_serving else None)
        # An answer, not an error: a page that may not show it is as it should be.
        answer = JSONResponse(
            {"ticket": ticket, "why": why}, headers={**_HEADERS, "cache-control": "no-store"}
        )
        await answer(scope, receive, send)


@contextmanager
def serve_coordinator(
    server: CoordinatorServer, loop: asyncio.AbstractEventLoop, address: HttpAddress
) -> Iterator[tuple[Page, int]]:
    """Serves all that a coordinator has to tell meanwhile; gives the page, and the port.

    Raises ConfigError for an address that cannot be listened on.
    """
    page = Page(server, loop, address)
    with serve_http([*coordinator_routes(server, loop), *page.routes()], address) as port:
        try:
            yield page, port
        finally:
            page.live.end()


class _ForReading:
    """Answers GET requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["method"] not in {"GET", "HEAD"}:
            app = PlainTextResponse("this page is for reading\n", 405, {"allow": "GET, HEAD"})
        await app(scope, receive, send)


class _File:
    """A file of the page, as it was when the coordinator was started."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._tag = f'"{blake3(self._data).hexdigest()[:16]}"'
        self._type = _TYPES[path.suffix]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {**_HEADERS, "etag": self._tag, "cache-control": "no-cache"}
        if Headers(scope=scope).get("if-none-match") == self._tag:
            await Response(status_code=304, headers=headers)(scope, receive, send)
        else:
            await Response(self._data, headers=headers, media_type=self._type)(scope, receive, send)
