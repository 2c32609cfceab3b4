"""Connections of a server of HTTP: how many, from where, and for how long without a request.

Whoever opens connections and says nothing costs others nothing: what waits longest for a request gives way to
what comes new, and is closed before long in any case. What asks whether a process is alive has a budget of
its own.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, Self, cast

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .hosts import OPEN_PATHS

MAX_CONNECTIONS: Final = 256
MAX_PER_ADDRESS: Final = 64
"""Of one IPv4 address, of one /64 of IPv6. A proxy is one address: those that watch by it fit in."""

HEADERS_S: Final = 5.0
"""For the headers of a request, from the connection's beginning or from the answer before."""

MAX_REQUESTS: Final = 128
MAX_OPEN_REQUESTS: Final = 32
"""Requests at a time; those for OPEN_PATHS are counted for themselves."""


class BoundedProtocol(H11Protocol):
    """One connection. An application may cut the one that it answers: `scope["state"]["abort"]`."""

    network = ""
    """Where the other end is."""
    _timer: asyncio.TimerHandle | None = None
    _waits_since_s: float | None = None
    """Loop time; None: it has no request, or one is being answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state: dict[str, Any] = {**self.app_state, "abort": transport.abort}
        self.network = _network(self.client[0] if self.client else "")
        self._wait_for_request()
        others = [cast(Self, one) for one in self.connections if one is not self]
        neighbours = [one for one in others if one.network == self.network]
        if len(neighbours) >= MAX_PER_ADDRESS:
            self._make_room(neighbours)
        elif len(others) >= MAX_CONNECTIONS:
            self._make_room(others)

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_request()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete:
            self._has_request()

    def on_response_complete(self) -> None:
        self._wait_for_request()
        super().on_response_complete()

    def _make_room(self, others: Iterable[Self]) -> None:
        """In the place of the one that waits longest; where all are busy this one goes itself."""
        waiting = [one for one in others if one._waits_since_s is not None]
        oldest = min(waiting, key=lambda one: one._waits_since_s or 0.0, default=self)
        oldest._cut()

    def _cut(self) -> None:
        self._has_request()
        self.connections.discard(self)  # now: the transport tells of its end in the loop's next turn
        self.transport.abort()

    def _wait_for_request(self) -> None:
        self._has_request()
        self._waits_since_s = self.loop.time()
        self._timer = self.loop.call_later(HEADERS_S, self._cut)

    def _has_request(self) -> None:
        self._waits_since_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _network(host: str) -> str:
    """Of which MAX_PER_ADDRESS connections are held."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


class Budgets:
    """Answers so many requests at a time, 503 to the others; whether a process is alive is always told."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._running = Counter[bool]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_open = scope["path"] in OPEN_PATHS
        if self._running[is_open] >= (MAX_OPEN_REQUESTS if is_open else MAX_REQUESTS):
            text = "too many requests at a time: try again\n"
            await PlainTextResponse(text, 503, {"retry-after": "1"})(scope, receive, send)
            return
        self._running[is_open] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[is_open] -= 1
