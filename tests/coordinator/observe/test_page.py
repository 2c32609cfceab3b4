"""The swarm's own page: what it gets, who gets it, how much that may cost; and that it survives a restart."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.routing import Route

from tests.support.service_world import World, offer
from tests.support.waiting import wait_until
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.observe.live import Live, Seen
from thinwire.coordinator.observe.overview import MAX_PEERS_SHOWN
from thinwire.coordinator.observe.page import FOLDER, serve_coordinator
from thinwire.coordinator.observe.page_history import MAX_SAVED_BYTES
from thinwire.coordinator.protocol.addresses import HttpAddress
from thinwire.coordinator.protocol.http.hosts import names_this_machine
from thinwire.coordinator.protocol.identity import save
from thinwire.coordinator.protocol.messages import GenesisBody, NodeState, Report, State
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.protocol.web import serve_http
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.service import Service

WAIT_S = 30.0
Answer = tuple[int, bytes, dict[str, str]]


def get(port: int, path: str, method: str = "GET", **headers: str) -> Answer:
    """Status, body and headers; follows no redirect."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}


class Events:
    """A client of /events; closed in the end of a test."""

    opened: ClassVar[list[Events]] = []

    def __init__(self, port: int, **headers: str) -> None:
        self.opened.append(self)
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        self._connection.request("GET", "/events", headers=headers)
        self.answer = self._connection.getresponse()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        name = ""
        while line := self.answer.readline().decode():
            if line.startswith("event: "):
                name = line[7:].strip()
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first state for which it holds."""
        return next(data for name, data in self if name == "now" and condition(data))

    def close(self) -> None:
        self.answer.close()
        self._connection.close()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while Events.opened:
        Events.opened.pop().close()


# --------------------------------------------------------------------------------- what the page is told


class Watched(World):
    """Its wall clock goes with the test's; `history`: what a coordinator finds beside the ledger."""

    history: bytes | None = None

    def start(self) -> None:
        self.blobs = BlobStore(self.path / "blobs")
        self.service = Service(
            ledger=self.ledger,
            blobs=self.blobs,
            key=self.key,
            token="secret",
            send=lambda peer, message: self.sent.append((peer, message)),
            on_commit=self.committed.append,
            now_s=self.now_s,
            wall_ms=lambda: round(1000 * self.now_s),
            history=self.history,
        )


@pytest.fixture
def world(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> Iterator[Watched]:
    world = Watched(tmp_path, make_genesis(rounds=1000, max_peers=300), key)
    yield world
    world.ledger.close()


def told(world: Watched) -> dict[str, Any]:
    overview = world.service.overview(world.now_s)
    json.dumps([overview, world.service.trend(0)], allow_nan=False)
    return overview


def states(overview: Mapping[str, Any]) -> list[str]:
    return [peer["state"] for peer in overview["peers"]]


def test_before_the_first_round(world: Watched) -> None:
    assert (told(world)["state"], told(world)["waits_for"]) == ("waiting", 2)
    assert world.service.status(world.now_s)["waits_for"] == 2
    world.train("a")
    assert told(world)["waits_for"] == 1
    assert told(world)["peers"][0]["share"] is None
    world.train("b")
    assert (told(world)["state"], told(world)["waits_for"]) == ("training", 0)
    assert [h["text"][:6] for h in told(world)["happenings"]] == ["peer 1", "peer 0"]
    assert world.service.trend(0)["index"] == []


def test_rounds_peers_and_faults(world: Watched) -> None:
    world.open("a", device="2 x NVIDIA H200")
    world.open("b", device="AMD\n<b>EPYC</b>\u202e")
    for name in ("a", "b"):
        world.say(name, State(state=NodeState.TRAINING))
    for round_ in range(1, 6):
        world.now_s += 0.5
        world.round(round_, "a", "b")
    world.say("a", Report(round=5, fingerprint=b"12345678"))
    assert told(world)["peers"][0]["agreement"] == (0, 0)
    world.say("b", Report(round=5, fingerprint=b"87654321"))
    now = told(world)
    assert now["round"] == 5
    assert [peer["device"] for peer in now["peers"]] == ["2 x NVIDIA H200", "AMD <b>EPYC</b>"]
    assert [peer["agreement"] for peer in now["peers"]] == [(0, 1), (0, 1)]
    assert [peer["share"] for peer in now["peers"]] == [0.5, 0.5]
    assert now["happenings"][0]["kind"] == "differs"
    assert now["happenings"][0]["text"] == "round 5: peer 1 …b differs from peer 0 …a"
    newest = now["entries"][0]
    assert (newest["round"], newest["n_offers"], newest["why"]) == (5, 2, "complete")
    assert newest["duration_s"] == pytest.approx(0.5)
    assert newest["digest"] == world.ledger.head_digest.hex()[:12]
    points = world.service.trend(0)
    assert points["round"] == [1, 2, 3, 4, 5]
    assert points["round_s"] == pytest.approx([0.5] * 5)

    world.service.closed("b", world.sessions["b"], world.now_s)
    world.wait(60, "a")
    now = told(world)
    assert states(now) == ["training", "gone"]
    assert now["happenings"][0]["kind"] == "lost"
    assert now["peers"][0]["seen_ms"] is None  # a moment ago
    assert now["peers"][1]["seen_ms"] == round(1000 * (world.now_s - 60))
    world.say("a", offer(500))
    assert told(world)["happenings"][0]["kind"] == "rejected"
    world.say("a", State(state=NodeState.LEAVING))
    assert told(world)["happenings"][0]["kind"] == "left"


def test_the_past_survives_a_restart(world: Watched) -> None:
    world.open("a", "b", device="a GPU")
    for name in ("a", "b"):
        world.say(name, State(state=NodeState.TRAINING))
    for round_ in range(1, 41):
        world.now_s += 0.25
        world.round(round_, "a", "b")
    world.say("a", Report(round=0, held_out=5.5))
    before, points, history = told(world), world.service.trend(0), world.service.history()
    assert points["held_out"][0] == 5.5
    assert len(history) < MAX_SAVED_BYTES
    world.ledger.close()
    world.history = history
    world.restart()
    after = told(world)
    for name in ("entries", "happenings", "round", "loss", "payload_bytes", "ddp_bytes", "mismatches"):
        assert after[name] == before[name], name
    assert [p["device"] for p in after["peers"]] == ["a GPU", "a GPU"]
    assert [p["share"] for p in after["peers"]] == [0.5, 0.5]
    again = world.service.trend(0)
    assert again | {"stamp": 0} == points | {"stamp": 0}
    world.history = None  # the file is lost: what the ledger has is there all the same
    world.restart()
    bare = world.service.trend(0)
    assert bare["loss"] == points["loss"]
    assert bare["held_out"] == points["held_out"]
    assert told(world)["entries"][0]["digest"] == before["entries"][0]["digest"]
    assert told(world)["entries"][0]["why"] is None


def test_hundreds_of_peers_stay_bounded(world: Watched) -> None:
    names = [f"12D3KooW{i:044d}" for i in range(200)]
    for name in names:
        world.open(name, device="x" * 100)
    for name in names:
        world.say(name, State(state=NodeState.TRAINING))
    for round_ in range(1, 4):
        world.now_s += 1
        world.round(round_, *names)
    now = told(world)
    assert now["round"] == 3
    assert len(now["peers"]) == 200
    assert now["n_peers"] == {"joining": 0, "training": 200, "gone": 0}
    assert len(json.dumps(now)) < 80_000
    assert sum(peer["share"] for peer in now["peers"]) == pytest.approx(1, abs=0.2)
    for name in names[:100]:
        world.say(name, State(state=NodeState.LEAVING))
    for i in range(100):
        world.open(f"12D3KooWnew{i:041d}")
    now = told(world)
    assert sum(now["n_peers"].values()) == 300
    assert len(now["peers"]) == MAX_PEERS_SHOWN
    assert states(now)[:200].count("gone") == 0  # those that are there come first
    assert len(world.service.history()) < 100_000


# ------------------------------------------------------------------------------------------ who gets it


class Serving:
    """A coordinator that serves its page."""

    def __init__(
        self, folder: Path, genesis: GenesisBody | None, stack: ExitStack, address: HttpAddress
    ) -> None:
        self.thread = stack.enter_context(ServerThread(folder, genesis))
        server, loop = self.thread.server, self.thread.loop
        self.page, self.port = stack.enter_context(serve_coordinator(server, loop, address))


@pytest.fixture
def serving(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> Iterator[Callable[..., Serving]]:
    with ExitStack() as stack:

        def start(host: str = "127.0.0.1", token: str | None = None) -> Serving:
            folder = tmp_path / f"coordinator-{host}-{token}"
            folder.mkdir()
            save(key, folder / "key")
            return Serving(folder, make_genesis(), stack, HttpAddress(host, 0, token))

        yield start


@pytest.mark.swarm
def test_on_this_machine_alone(serving: Callable[..., Serving]) -> None:
    served = serving()
    port = served.port
    code, body, headers = get(port, "/")
    assert code == 200
    assert headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for file in FOLDER.iterdir():
        if file.name == "index.html":
            continue
        code, data, headers = get(port, f"/static/{file.name}")
        assert (code, data) == (200, file.read_bytes())
        assert headers["x-content-type-options"] == "nosniff"
        assert get(port, f"/static/{file.name}", **{"If-None-Match": headers["etag"]})[0] == 304
        assert file.suffix == ".txt" or f"static/{file.name}".encode() in body
    assert b"<script>" not in body
    assert b" style=" not in body
    assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
    for path in ("/static/../page.py", "/static/%2e%2e/page.py", "/static/", "/static/nothing.js"):
        assert get(port, path)[0] == 404
    assert get(port, "/", "POST")[0] == 405
    assert get(port, "/ticket", "DELETE")[0] == 405
    line = json.loads(get(port, "/ticket")[1])["ticket"]
    assert Ticket.parse(line) == served.thread.ticket
    events = Events(port)
    assert events.answer.getheader("content-type") == "text/event-stream; charset=utf-8"
    assert events.until(lambda _: True)["waits_for"] == 2
    events.close()
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1", ""):
        for path in ("/", "/ticket", "/events", "/static/page.js"):
            assert get(port, path, Host=host)[0] == 403, (host, path)
    assert get(port, "/healthz", Host="evil.example")[0] == 200  # nothing that is not for everybody
    assert get(port, "/ticket", Host=f"localhost:{port}")[0] == 200
    for proxy in ("X-Forwarded-For", "Forwarded", "Via"):  # whose client is somebody else
        assert json.loads(get(port, "/ticket", **{proxy: "10.0.0.1"})[1])["ticket"] is None


@pytest.mark.swarm
def test_elsewhere_the_ticket_is_for_those_who_know_the_token(serving: Callable[..., Serving]) -> None:
    bare = serving("0.0.0.0").port
    for path in ("/", "/ticket", "/events", "/metrics", "/sd"):
        assert get(bare, path, Host="evil.example")[0] == 403, path
    for host in ("10.0.0.1:9100", "[fd00::1]:9100", "coordinator:9100", "localhost", socket.gethostname()):
        assert get(bare, "/sd", Host=host)[0] == 200, host
    shown = json.loads(get(bare, "/ticket")[1])
    assert shown["ticket"] is None
    assert "--http-token" in shown["why"]
    assert b"tw1-" not in get(bare, "/ticket")[1]
    port = serving("0.0.0.0", "secret").port
    html = {"Accept": "text/html,*/*"}
    for path in ("/", "/ticket", "/events", "/metrics", "/sd", "/static/page.js"):
        assert get(port, path)[0] == 401, path
        assert get(port, path, Cookie="thinwire=secret", **html)[0] == 401, path
    assert b"<form" in get(port, "/", **html)[1]
    assert get(port, "/?token=wrong")[0] == 401
    assert get(port, "/metrics?token=secret")[0] == 401  # only where a browser begins
    assert get(port, "/?" + "token=secret&" * 1000)[0] == 401
    code, _, headers = get(port, "/?token=secret")
    assert (code, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "secret" not in cookie
    name_and_value = cookie.partition(";")[0]
    for path in ("/", "/ticket", "/metrics", "/static/page.js"):
        assert get(port, path, Cookie=f"a=b; {name_and_value}", Host="swarm.example")[0] == 200, path
        assert get(port, path, Authorization="Bearer secret")[0] == 200, path
    assert get(port, "/", Cookie=name_and_value[:-1])[0] == 401
    assert get(port, "/", Cookie="\x80;=;;" + "a" * 5000)[0] == 401
    events = Events(port, Cookie=name_and_value)
    assert events.until(lambda _: True)["state"] == "waiting"
    events.close()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9100", True),
        ("localhost:9100", True),
        ("LOCALHOST", True),
        ("[::1]:9100", True),
        ("[::1]", True),
        ("a.localhost:1", True),
        ("", False),
        ("[::1].evil.example", False),
        ("localhost.evil.example", False),
        ("evil.example", False),
        ("192.168.1.2", False),
        ("0.0.0.0", False),
    ],
)
def test_names_of_this_machine(host: str, expected: bool) -> None:
    assert names_this_machine(host) is expected


@pytest.mark.swarm
def test_what_was_seen_is_kept_beside_the_ledger(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> None:
    """By a coordinator that stops; damaged, it is begun anew."""
    save(key, tmp_path / "key")

    def happenings() -> list[str]:
        with ServerThread(tmp_path) as thread:
            now, _ = thread.call(lambda server: server.look(0))
            return [happening["text"] for happening in now["happenings"]]

    with ServerThread(tmp_path, make_genesis()) as thread:
        thread.call(lambda server: server.service.count_rejected("token"))
        thread.call(lambda server: server.service.tick(time.monotonic()))
    assert (tmp_path / "history.json").stat().st_size < 10_000
    assert happenings() == happenings() == ["token"]
    (tmp_path / "history.json").write_bytes(b"x" * (MAX_SAVED_BYTES + 1))
    assert happenings() == []
    (tmp_path / "history.json").unlink()
    assert happenings() == []


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_whatever_is_written_can_be_read(theme: int) -> None:
    """WCAG AA: 4.5 to 1 for text, on cards and beside them."""
    declared = re.findall(r":root \{(.*?)\}", (FOLDER / "page.css").read_text(), re.DOTALL)
    colors = {k: v for block in declared[: theme + 1] for k, v in re.findall(r"--(\w+): (#\w+);", block)}
    assert len(declared) == 2
    for text in ("ink", "soft", "green", "red", "yellow", "orange", "blue"):
        for ground in ("card", "bg"):
            dark, light = sorted(_luminance(colors[name]) for name in (text, ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def _luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    parts = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---------------------------------------------------------------------------------- what it may cost


class Fountain:
    """Something to look at: every time it is another `n_bytes`."""

    def __init__(self, n_bytes: int = 10) -> None:
        self.n_bytes, self.n_looks = n_bytes, 0
        self.error: Exception | None = None

    async def look(self, since: int) -> Seen:
        self.n_looks += 1
        if self.error is not None:
            raise self.error
        now = {"n": self.n_looks, "state": "training", "more": "x" * self.n_bytes}
        return now, {"stamp": self.n_looks, "index": [0], "since": since}


@contextlib.contextmanager
def flowing(fountain: Fountain, max_watchers: int = 48) -> Iterator[tuple[Live, int]]:
    served = Live(fountain.look, every_s=0.01, bytes_per_s=1e12, max_watchers=max_watchers)
    with serve_http([Route("/events", served)], HttpAddress("127.0.0.1", 0)) as port:
        try:
            yield served, port
        finally:
            served.end()


def eventually(condition: Callable[[], bool], what: str) -> None:
    wait_until(condition, WAIT_S, lambda: what)


def test_a_watcher_gets_the_whole_picture_and_then_what_is_new() -> None:
    fountain = Fountain()
    with flowing(fountain) as (served, port):
        events = Events(port)
        names = iter(events)
        first, second = next(names), next(names)
        assert (first[0], first[1]["since"]) == ("points", 0)
        assert (second[0], second[1]["n"]) == ("now", 1)
        later = [next(names) for _ in range(6)]
        assert [name for name, _ in later] == ["points", "now"] * 3
        assert [data["since"] for name, data in later[2:] if name == "points"] == [2, 3]
        events.close()
        eventually(lambda: served.n_watchers == 0, "the watcher was not forgotten")
        assert served._looking is not None
        eventually(served._looking.done, "it is looked at without anybody to show it to")
        n_looks = fountain.n_looks
        again = iter(Events(port))
        assert next(again)[1]["since"] == 0
        assert next(again)[1]["n"] == n_looks + 1  # not what was seen before


def test_the_last_word_is_heard_and_then_it_is_over() -> None:
    with flowing(Fountain()) as (served, port):
        events = Events(port)
        names = iter(events)
        assert next(names)[0] == "points"
        served.end(("now", {"state": "finished"}))
        *_, last = names
        assert last[0] == "now"
        assert last[1]["state"] == "finished"
        assert get(port, "/events")[0] == 503
    assert not [t for t in threading.enumerate() if t.name == "http"]


def test_the_number_of_watchers_is_bounded() -> None:
    with flowing(Fountain(), max_watchers=3) as (served, port):
        watching = [Events(port) for _ in range(3)]
        assert [next(iter(one))[0] for one in watching] == ["points"] * 3
        code, _, headers = get(port, "/events")
        assert (code, headers["retry-after"]) == (503, "30")
        watching[0].close()
        eventually(lambda: served.n_watchers == 2, "the watcher was not forgotten")
        assert next(iter(Events(port)))[0] == "points"


def test_who_does_not_read_is_cut_off_and_holds_up_nobody() -> None:
    with flowing(Fountain(n_bytes=400_000)) as (served, port), ExitStack() as stack:
        for _ in range(8):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", port))
            slow.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: served.n_watchers == 8, "they were not let in")
        quick_one = stack.enter_context(contextlib.closing(Events(port)))
        names = iter(quick_one)

        def only_one_is_left() -> bool:
            assert next(names)[0] in {"points", "now"}
            return served.n_watchers == 1

        eventually(only_one_is_left, "slow ones are still served")
        assert next(names)[0] in {"points", "now"}


def test_a_coordinator_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    fountain = Fountain()
    with flowing(fountain) as (_, port):
        fountain.error = TimeoutError()
        assert get(port, "/events")[0] == 503
        fountain.error = None
        names = iter(Events(port))
        assert next(names)[0] == "points"
        fountain.error = OSError("gone")
        eventually(lambda: "cannot be told" in caplog.text, "it did not fail")
        fountain.error = None
        n = fountain.n_looks
        assert next(data["n"] for name, data in names if name == "now" and data["n"] > n)
