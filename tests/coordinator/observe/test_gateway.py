"""What a coordinator serves over HTTP: discovery, nodes' metrics over their own sessions, health, tokens."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.prometheus import series, value
from tests.support.waiting import WAIT_S, eventually
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.observe.metrics_requests import MetricsRequests, Unanswered
from thinwire.coordinator.observe.page import serve_coordinator
from thinwire.coordinator.protocol.addresses import HttpAddress
from thinwire.coordinator.protocol.exposition import packed, unpacked
from thinwire.coordinator.protocol.http.hosts import is_loopback
from thinwire.coordinator.protocol.identity import save
from thinwire.coordinator.protocol.messages import (
    MAX_METRICS_BYTES,
    AskMetrics,
    GenesisBody,
    Message,
    Metrics,
    NodeState,
)
from thinwire.coordinator.protocol.streams import BadFrame
from thinwire.coordinator.protocol.web import metrics_routes, serve_http
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.stream_server import Waits
from thinwire.node.links.hivemind import HivemindLink
from thinwire.node.tracking.metrics import NodeMetrics


def get(port: int, path: str, host: str | None = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    """Status, body and headers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    if host is not None:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read().decode(), {k.lower(): v for k, v in e.headers.items()}


# ------------------------------------------------------------------------------------------ a node's own


def test_a_node_serves_its_metrics_and_is_ready_while_it_trains() -> None:
    metrics = NodeMetrics()
    routes = metrics_routes(metrics.registry, lambda: metrics.is_training)
    with serve_http(routes, HttpAddress("127.0.0.1", 0)) as port:
        code, text, headers = get(port, "/metrics")
        assert code == 200
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        assert value(text, "thinwire_training") == 0
        assert get(port, "/healthz")[:2] == (200, "ok\n")
        assert get(port, "/readyz")[0] == 503
        metrics.training(True)
        assert get(port, "/readyz")[:2] == (200, "ready\n")
        assert get(port, "/sd")[0] == 404
        openmetrics = get(port, "/metrics", accept="application/openmetrics-text;version=1.0.0")
        assert openmetrics[1].endswith("# EOF\n")
        taken = serve_http(routes, HttpAddress("127.0.0.1", port))
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*choose another port"), taken:
            pass
    with pytest.raises(urllib.error.URLError):
        get(port, "/healthz")
    assert not [t for t in threading.enumerate() if t.name == "http"]


def test_a_token_protects_all_but_health(caplog: pytest.LogCaptureFixture) -> None:
    metrics = NodeMetrics()
    routes = metrics_routes(metrics.registry, lambda: True)
    with serve_http(routes, HttpAddress("127.0.0.1", 0, "secret")) as port:
        assert get(port, "/metrics")[0] == 401
        assert get(port, "/metrics", authorization="Bearer wrong")[0] == 401
        assert get(port, "/metrics", authorization="Bearer secret")[0] == 200
        assert get(port, "/healthz")[0] == get(port, "/readyz")[0] == 200
    assert not caplog.records
    with serve_http(routes, HttpAddress("0.0.0.0", 0)):
        pass
    assert "--http-token protects it" in caplog.text


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# ---------------------------------------------------------------------------------- asking and answering


def test_answers_come_back_as_they_were_given() -> None:
    text = NodeMetrics().text()
    assert unpacked(packed(text)) == text
    assert len(packed(text).text) < 4096
    assert b"too large" in unpacked(packed(bytes(10**6)))
    assert b"too large" in unpacked(packed(random.Random(1).randbytes(2 * MAX_METRICS_BYTES)))


@pytest.mark.parametrize(
    "data",
    [b"", b"no zlib", zlib.compress(b"x" * 10**6), zlib.compress(b"x")[:-1], zlib.compress(b"x") + b"y"],
    ids=["empty", "garbage", "bomb", "cut", "more"],
)
def test_answers_that_no_node_gives(data: bytes) -> None:
    with pytest.raises(BadFrame):
        unpacked(Metrics(text=data))


def test_however_many_ask_a_node_is_asked_once() -> None:
    posted: list[tuple[str, Message]] = []

    def post(peer_id: str, message: Message) -> bool:
        posted.append((peer_id, message))
        return peer_id != "nobody"

    async def run() -> None:
        asking = MetricsRequests(post)
        with pytest.raises(Unanswered, match="not connected"):
            await asking.metrics("nobody")
        posted.clear()
        many = [asyncio.ensure_future(asking.metrics("a")) for _ in range(50)]
        await asyncio.sleep(0)
        assert posted == [("a", AskMetrics())]
        asking.answered("a", packed(b"one"))
        assert set(await asyncio.gather(*many)) == {b"one"}
        assert await asking.metrics("a") == b"one"  # still fresh
        assert len(posted) == 1
        asking.answered("a", packed(b"two"))  # nobody has asked
        assert await asking.metrics("a") == b"one"

    asyncio.run(run())


def test_a_node_that_does_not_answer_is_not_asked_again_and_again() -> None:
    posted: list[str] = []

    def post(peer_id: str, _message: Message) -> bool:
        posted.append(peer_id)
        return True

    async def run() -> None:
        asking = MetricsRequests(post, answer_timeout_s=0.01)
        for _ in range(3):
            with pytest.raises(Unanswered, match="does not answer"):
                await asking.metrics("a")
        assert posted == ["a"]

    asyncio.run(run())


def test_nobody_waits_for_a_session_that_is_over_or_an_answer_that_is_none() -> None:
    async def run() -> None:
        asking = MetricsRequests(lambda _peer_id, _message: True)
        waiting = asyncio.ensure_future(asking.metrics("a"))
        await asyncio.sleep(0)
        asking.forget("a")
        with pytest.raises(Unanswered, match="lost its connection"):
            await waiting
        last = asyncio.ensure_future(asking.metrics("a"))
        await asyncio.sleep(0)
        with pytest.raises(BadFrame):
            asking.answered("a", Metrics(text=b"garbage"))
        with pytest.raises(Unanswered):
            await last

    asyncio.run(run())


# ------------------------------------------------------------------------------------------- the gateway


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Served:
    """A coordinator over real libp2p that serves HTTP, and links to it."""

    def __init__(
        self,
        folder: Path,
        genesis: GenesisBody,
        key: Ed25519PrivateKey,
        stack: ExitStack,
        waits: Waits = Waits(),  # noqa: B008 - frozen
    ) -> None:
        state = folder / "coordinator"
        state.mkdir()
        save(key, state / "key")
        self._folder, self._stack = folder, stack
        self.coordinator = stack.enter_context(ServerThread(state, genesis, waits=waits))
        server, loop = self.coordinator.server, self.coordinator.loop
        address = HttpAddress("127.0.0.1", 0, names=("coordinator.example",))
        _, self.port = stack.enter_context(serve_coordinator(server, loop, address))

    def node(self, name: str, metrics: Callable[[], bytes] = bytes, is_open: bool = True) -> HivemindLink:
        link = HivemindLink(
            self.coordinator.ticket, state=self._folder / name, host="127.0.0.1", metrics=metrics
        )
        self._stack.callback(link.close)
        if is_open:
            link.open()
            link.state(NodeState.TRAINING)
        return link

    def targets(self) -> list[str]:
        return [t["labels"]["instance"] for t in json.loads(get(self.port, "/sd")[1])]


@pytest.fixture
def served(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey, stack: ExitStack
) -> Served:
    return Served(tmp_path, make_genesis(), key, stack)


@pytest.mark.swarm
def test_discovery_lists_who_is_there_and_who_was_lost(served: Served) -> None:
    assert get(served.port, "/sd")[:2] == (200, "[]")
    nodes = [served.node(f"node-{i}") for i in range(3)]
    code, body, headers = get(served.port, "/sd", host="coordinator.example:9100")
    assert code == 200
    assert headers["content-type"] == "application/json"
    for target, node in zip(json.loads(body), nodes, strict=True):
        assert target == {
            "targets": ["coordinator.example:9100"],
            "labels": {"__metrics_path__": f"/peers/{node.peer_id}/metrics", "instance": node.peer_id},
        }
    for path in ("/sd", "/metrics", f"/peers/{nodes[0].peer_id}/metrics"):
        for host in ("evil.example:9100", "coordinator", "10.0.0.1:9100"):
            code, text, _ = get(served.port, path, host=host)
            assert (code, "--http-host" in text) == (403, True), (path, host)
    assert get(served.port, "/sd", host="127.0.0.1:nine")[0] == 400
    nodes[0].close()  # it says that it leaves
    assert eventually(lambda: served.targets() == [nodes[1].peer_id, nodes[2].peer_id])
    nodes[1].kill()  # and this one does not
    assert eventually(lambda: get(served.port, f"/peers/{nodes[1].peer_id}/metrics")[0] == 504)
    assert served.targets() == [nodes[1].peer_id, nodes[2].peer_id]
    text = get(served.port, "/metrics")[1]
    assert value(text, "thinwire_swarm_joins_total", kind="new") == 3
    assert value(text, "thinwire_swarm_leaves_total", reason="said_so") == 1


@pytest.mark.swarm
def test_the_gateway_asks_a_node_over_its_session(served: Served) -> None:
    metrics = NodeMetrics()
    calls: list[str] = []

    def text() -> bytes:
        calls.append(threading.current_thread().name)
        return metrics.text()

    metrics.held_out(1.25)
    node = served.node("node", text)
    path = f"/peers/{node.peer_id}/metrics"
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: get(served.port, path), range(64)))
    assert {code for code, _, _ in answers} == {200}
    assert value(answers[0][1], "thinwire_held_out_loss") == 1.25
    assert answers[0][2]["content-type"].startswith("text/plain; version=0.0.4")
    assert answers[0][2]["x-content-type-options"] == "nosniff"
    assert len(calls) < 64 / 4  # once a second, however long the 64 took
    assert get(served.port, "/peers/12D3KooWnobody/metrics")[0] == 404
    assert get(served.port, "/peers/" + "x" * 500 + "/metrics")[0] == 404
    assert get(served.port, "/healthz")[0] == get(served.port, "/readyz")[0] == 200
    silent = served.node("silent")
    told = get(served.port, f"/peers/{silent.peer_id}/metrics")
    assert told[0] == 200
    assert {name.removesuffix("_total") for name, _ in series(told[1])} == {  # what is known of it here
        "thinwire_peer_condemned",
        "thinwire_peer_audits",
        "thinwire_peer_rejected",
        "thinwire_peer_offers",
    }


@pytest.mark.swarm
def test_a_node_that_cannot_read_its_metrics_or_is_slow(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey, stack: ExitStack
) -> None:
    served = Served(tmp_path, make_genesis(), key, stack, Waits(metrics_s=0.3))

    def broken() -> bytes:
        raise RuntimeError("no such gauge")

    asked, go_on = threading.Event(), threading.Event()

    def slow() -> bytes:
        asked.set()
        go_on.wait(WAIT_S)
        return b""

    node, sleeper = served.node("node", broken), served.node("sleeper", slow)
    answers: list[tuple[int, str, dict[str, str]]] = []

    def is_answered() -> bool:
        answers.append(get(served.port, f"/peers/{node.peer_id}/metrics"))
        return answers[-1][0] == 200

    assert eventually(is_answered), "on a busy machine any node may be slow"
    assert all(name.startswith("thinwire_peer_") for name, _ in series(answers[-1][1]))
    code, body, _ = get(served.port, f"/peers/{sleeper.peer_id}/metrics")
    assert code == 504
    assert "does not answer" in body
    assert asked.wait(WAIT_S)
    go_on.set()
    assert eventually(lambda: get(served.port, f"/peers/{sleeper.peer_id}/metrics")[0] == 200)
    assert {p["state"] for p in served.coordinator.status()["peers"]} == {"training"}
