"""Who is answered over HTTP, and at whose cost: names, half-open connections, budgets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tests.support.waiting import wait_until
from thinwire.coordinator.protocol.addresses import HttpAddress, host_of
from thinwire.coordinator.protocol.http.connections import (
    HEADERS_S,
    MAX_CONNECTIONS,
    MAX_PER_ADDRESS,
    MAX_REQUESTS,
)
from thinwire.coordinator.protocol.http.hosts import OnlyForItsNames, named_in, names_this_machine
from thinwire.coordinator.protocol.web import metrics_routes, serve_http
from thinwire.node.tracking.metrics import NodeMetrics

WAIT_S = 30.0


class Held:
    """Answers only once it may."""

    def __init__(self) -> None:
        self.go, self.n_asked = threading.Event(), 0

    async def answer(self, _request: Request) -> Response:
        self.n_asked += 1
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return PlainTextResponse("at last")

    def until_asked(self, n: int) -> None:
        wait_until(lambda: self.n_asked >= n, WAIT_S, lambda: f"{self.n_asked} requests came")


@contextmanager
def served(*more: Route) -> Iterator[int]:
    routes = [*metrics_routes(NodeMetrics().registry, lambda: True), *more]
    with serve_http(routes, HttpAddress("127.0.0.1", 0)) as port:
        yield port


def status_of(port: int, path: str, source: str = "127.0.0.1") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S, source_address=(source, 0))
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def silent(stack: ExitStack, port: int, said: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    """A connection that says no more than this."""
    opened = stack.enter_context(
        socket.create_connection(("127.0.0.1", port), timeout=WAIT_S, source_address=(source, 0))
    )
    opened.sendall(said)
    return opened


def is_closed(opened: socket.socket) -> bool:
    """Whether the other end closes it, now or in time, whatever it says before."""
    try:
        while opened.recv(1000):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


# -------------------------------------------------------------------------------------------- connections


@pytest.mark.parametrize("n_addresses", [1, 20])
def test_half_open_connections_keep_nobody_out(n_addresses: int) -> None:
    """300 of them; from one address, and from many (all of 127.0.0.0/8 is this machine's)."""
    with served() as port, ExitStack() as stack:
        for i in range(300):
            silent(stack, port, b"GET /metrics HTTP/1.1\r\nHost: loc", f"127.0.1.{i % n_addresses + 1}")
        for path in ("/healthz", "/readyz", "/metrics"):
            assert status_of(port, path) == 200


def test_a_connection_without_a_request_is_closed_in_time() -> None:
    """However busily it sends headers; one that is being answered is not."""
    held = Held()
    with served(Route("/held", held.answer)) as port, ExitStack() as stack:
        stack.callback(held.go.set)
        asked = silent(stack, port, b"GET /held HTTP/1.1\r\nHost: localhost\r\n\r\n")
        began_s = time.monotonic()
        nothing = silent(stack, port)
        again = silent(stack, port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert again.recv(1000).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /healthz HTTP/1.1\r\n")
        drop = silent(stack, port, b"GET /metrics HTTP/1.1\r\n")
        drop.settimeout(0.2)
        with contextlib.suppress(OSError):
            while time.monotonic() < began_s + WAIT_S:
                drop.sendall(b"a: b\r\n")
                with contextlib.suppress(TimeoutError):
                    if not drop.recv(1):
                        break
        assert time.monotonic() >= began_s + HEADERS_S - 0.5
        assert is_closed(nothing)
        assert is_closed(again)
        held.go.set()
        assert asked.recv(1000).startswith(b"HTTP/1.1 200")


def test_connections_of_one_address_are_bounded() -> None:
    """The one that waits longest goes, never one that is being answered."""
    held = Held()
    with served(Route("/held", held.answer)) as port, ExitStack() as stack:
        stack.callback(held.go.set)
        asked = silent(stack, port, b"GET /held HTTP/1.1\r\nHost: localhost\r\n\r\n", "127.0.0.2")
        held.until_asked(1)
        waiting = [silent(stack, port, source="127.0.0.2") for _ in range(MAX_PER_ADDRESS)]
        assert is_closed(waiting[0])
        waiting[1].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert waiting[1].recv(1000).startswith(b"HTTP/1.1 200")
        held.go.set()
        assert asked.recv(1000).startswith(b"HTTP/1.1 200")


def test_whether_a_process_is_alive_is_told_beside_all_other_requests() -> None:
    held = Held()
    with served(Route("/held", held.answer)) as port, ExitStack() as stack:
        stack.callback(held.go.set)
        per_address = MAX_PER_ADDRESS // 2
        for i in range(MAX_REQUESTS):
            said = b"GET /held HTTP/1.1\r\nHost: localhost\r\n\r\n"
            silent(stack, port, said, f"127.0.2.{i // per_address + 1}")
        held.until_asked(MAX_REQUESTS)
        assert status_of(port, "/metrics") == 503
        assert status_of(port, "/healthz") == 200
        held.go.set()
        wait_until(lambda: status_of(port, "/metrics") == 200, WAIT_S, lambda: "no room was made")
    assert MAX_REQUESTS < MAX_CONNECTIONS


# -------------------------------------------------------------------------------------------------- names


def answered(address: HttpAddress, host: str) -> int:
    """The status for a request of this Host."""
    sent: list[int] = []

    async def app(scope: object, receive: object, send: object) -> None:
        sent.append(200)

    async def send(message: object) -> None:
        if message["type"] == "http.response.start":  # type: ignore[index]
            sent.append(message["status"])  # type: ignore[index]

    async def receive() -> dict[str, str]:
        return {"type": "http.request"}

    headers = [(b"host", host.encode("latin-1"))]
    scope = {"type": "http", "method": "GET", "path": "/metrics", "headers": headers}
    coroutine = OnlyForItsNames(app, address)(scope, receive, send)  # type: ignore[arg-type]
    with contextlib.suppress(StopIteration):
        coroutine.send(None)
    return sent[0]


NAMED = HttpAddress("0.0.0.0", 9100, names=("Swarm.Example",))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("192.168.1.2:9100", 200),
        ("[fd00::1]:9100", 200),
        ("coordinator:9100", 200),
        ("swarm.example", 200),
        ("SWARM.example.:9100", 200),
        ("localhost:1", 200),
        ("evil.example", 403),
        ("192.168.1.2.evil.example", 403),
        ("coordinator.evil.example:9100", 403),
        ("[evil.example]:9100", 403),
        ("", 403),
        (".", 403),
        (":9100", 403),
        ("a b", 403),
    ],
)
def test_names_that_are_answered(host: str, expected: int) -> None:
    assert answered(NAMED, host) == expected


def test_on_this_machine_alone_a_name_is_answered_that_was_given() -> None:
    address = HttpAddress("127.0.0.1", 9100, names=("swarm.example",))
    found = [answered(address, host) for host in ("swarm.example", "coordinator", "10.0.0.1", "127.0.0.1")]
    assert found == [200, 403, 403, 200]


@given(st.text(st.characters(max_codepoint=255), max_size=60))
def test_any_host_is_answered_or_refused(host: str) -> None:
    assert answered(NAMED, host) in (200, 403)
    assert not (names_this_machine(host) and named_in(host) == "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("swarm.example:4001", "swarm.example"),
        ("coordinator", "coordinator"),
        ("[fd00::1]:4001", "fd00::1"),
        ("/ip4/10.0.0.1/tcp/1", "10.0.0.1"),
        ("/dns/a.b/tcp/1", "a.b"),
    ],
)
def test_the_host_of_what_is_announced(text: str, expected: str) -> None:
    assert host_of(text, 4001) == expected
