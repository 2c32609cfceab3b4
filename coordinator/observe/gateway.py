"""What Prometheus asks of a coordinator: whom to scrape, and each node's metrics, also behind a NAT.

`/sd` is for `http_sd_config`. Every target in it is this coordinator itself, which fetches a node's metrics
over the node's own session: nodes need neither an open port nor an address that Prometheus can reach.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ..protocol.web import metrics_routes
from ..server import CoordinatorServer
from .metrics import register
from .metrics_requests import Unanswered

T = TypeVar("T")

SCRAPE_TIMEOUT_S: Final = 5.0
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")


def coordinator_routes(server: CoordinatorServer, loop: asyncio.AbstractEventLoop) -> list[BaseRoute]:
    """All that a coordinator serves; `loop` is the one that it runs in."""
    registry = CollectorRegistry()

    async def status() -> dict[str, Any]:
        return server.status()

    register(registry, lambda: asyncio.run_coroutine_threadsafe(status(), loop).result(SCRAPE_TIMEOUT_S))
    return [*metrics_routes(registry, lambda: server.is_serving), *_gateway(server, loop)]


def _gateway(server: CoordinatorServer, loop: asyncio.AbstractEventLoop) -> list[BaseRoute]:
    def in_its_loop(work: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))

    async def scraped() -> list[str]:
        return server.scraped()

    async def sd(request: Request) -> Response:
        host = request.headers.get("host", "")
        if not _HOST.fullmatch(host):
            return PlainTextResponse("the Host header says under which name targets are reached\n", 400)
        return JSONResponse([_target(host, peer_id) for peer_id in await in_its_loop(scraped())])

    async def peer_metrics(request: Request) -> Response:
        try:
            text = await in_its_loop(server.metrics_of(request.path_params["peer_id"]))
        except KeyError:
            return PlainTextResponse("no such peer was ever admitted\n", 404)
        except Unanswered as e:
            return PlainTextResponse(f"{e}\n", 504)
        headers = {"content-type": CONTENT_TYPE_PLAIN_0_0_4, "x-content-type-options": "nosniff"}
        return Response(text, headers=headers)

    return [Route("/sd", sd), Route("/peers/{peer_id}/metrics", peer_metrics)]


def _target(host: str, peer_id: str) -> dict[str, Any]:
    """`host`: as whoever asks reaches this coordinator."""
    return {
        "targets": [host],
        "labels": {"__metrics_path__": f"/peers/{peer_id}/metrics", "instance": peer_id},
    }
