"""The coordinator over real libp2p: who gets in, what breaks, what is left."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.waiting import WAIT_S, eventually, within
from thinwire.compression.errors import ConfigError, Incompatible, LedgerCorrupt, SwarmUnreachable
from thinwire.coordinator.entry import strangers
from thinwire.coordinator.protocol.blob_streams import NotServed, get_blob, put_blob
from thinwire.coordinator.protocol.files import write_aside
from thinwire.coordinator.protocol.identity import new_key, peer_id_of, save
from thinwire.coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    Commit,
    Follow,
    GenesisBody,
    Hello,
    Message,
    NodeState,
    Offer,
    Refused,
    Report,
    Welcome,
    digest_of,
    encode_message,
    encode_record,
)
from thinwire.coordinator.protocol.p2p import P2PTransport, start_p2p
from thinwire.coordinator.protocol.streams import (
    BLOB,
    FROM_COORDINATOR,
    HEADER,
    SESSION,
    FrameKind,
    Meter,
    Stream,
)
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.protocol.trust.signed_offers import check_work, signed
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.stream_server import Waits
from thinwire.node.cli.status import StatusClient, fetch_status
from thinwire.node.links.base import Link
from thinwire.node.links.hivemind import HivemindLink

pytestmark = [pytest.mark.swarm, pytest.mark.usefixtures("own_temp_folder")]

MakeGenesis = Callable[..., GenesisBody]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def take(link: Link, after: int, n: int) -> list[Commit]:
    return within(lambda: list(islice(link.commits(after), n)))  # type: ignore[no-any-return]


def offer(round_: int, payload: bytes) -> Offer:
    return Offer(
        round=round_, n_samples=4, n_tokens=64, loss=1.5, n_bytes=len(payload), payload=payload, digest=None
    )


class Chunk:
    """A shelf with one blob on it."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        if digest != digest_of(self._blob):
            raise KeyError(digest.hex())
        return BytesIO(self._blob), len(self._blob)


class Swarm:
    """A coordinator in this process and links to it."""

    def __init__(
        self, folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey, stack: ExitStack, waits: Waits
    ) -> None:
        self.folder, self.stack = folder, stack
        state = folder / "coordinator"
        state.mkdir()
        save(key, state / "key")
        self.coordinator = stack.enter_context(ServerThread(state, genesis, waits=waits))
        self.ticket = self.coordinator.ticket

    def link(self, name: str, ticket: Ticket | None = None, **options: Any) -> HivemindLink:
        link = HivemindLink(ticket or self.ticket, state=self.folder / name, host="127.0.0.1", **options)
        self.stack.callback(link.close)
        return link

    def trainer(self, name: str) -> HivemindLink:
        link = self.link(name)
        link.open()
        link.state(NodeState.TRAINING)
        return link

    def rejected(self) -> dict[str, int]:
        found: dict[str, int] = self.coordinator.status()["rejected"]
        return found

    def speak(self, body: Callable[[P2PTransport, Ticket], Awaitable[None]]) -> None:
        """Runs `body` with a bare host: a peer that does as it likes."""

        async def run() -> None:
            host = await start_p2p(new_key())
            try:
                await host.dial(self.ticket.peer_id, self.ticket.addresses, 5)
                async with asyncio.timeout(WAIT_S):
                    await body(host, self.ticket)
            finally:
                await host.close()

        asyncio.run(run())


@pytest.fixture
def make_swarm(
    tmp_path: Path, make_genesis: MakeGenesis, key: Ed25519PrivateKey, stack: ExitStack
) -> Callable[..., Swarm]:
    def make(waits: Waits = Waits(), **config: Any) -> Swarm:  # noqa: B008 - frozen
        return Swarm(tmp_path, make_genesis(**config), key, stack, waits)

    return make


async def open_stream(host: P2PTransport, ticket: Ticket, protocol: str) -> Stream:
    reader, writer = await host.open_stream(ticket.peer_id, protocol)
    return Stream(reader, writer, Meter())


def hello(ticket: Ticket, **changes: Any) -> Hello:
    return Hello(
        version=PROTOCOL_VERSION,
        run_id=ticket.run_id,
        token=ticket.token,
        head_round=None,
        head_digest=None,
        addresses=(),
        agent="test",
    ).model_copy(update=changes)


async def until_refused(stream: Stream) -> list[Message]:
    """All messages until the coordinator refuses to go on."""
    messages: list[Message] = []
    while not messages or not isinstance(messages[-1], Refused):
        messages.append(await stream.receive_message(FROM_COORDINATOR))
    stream.close()
    return messages


# -------------------------------------------------------------------------------------------- getting in


def test_wrong_tickets_are_told_apart(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1)
    honest = swarm.trainer("honest")
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"token": "wrong"}, ConfigError, "token is wrong"),
        ({"run_id": digest_of(b"another run")}, Incompatible, "the ticket is for run"),
        ({"peer_id": peer_id_of(new_key().public_key())}, SwarmUnreachable, "another peer answers there"),
        ({"addresses": ("/ip4/127.0.0.1/tcp/1",)}, SwarmUnreachable, "connection refused"),
    ]
    for n, (changes, error, text) in enumerate(wrong):
        link = swarm.link(f"x{n}", swarm.ticket.model_copy(update=changes))
        started_s = time.monotonic()
        with pytest.raises(error, match=text):
            link.open()
        assert time.monotonic() - started_s < 60
    with pytest.raises(ConfigError, match="token is wrong"):
        fetch_status(swarm.ticket.model_copy(update={"token": "wrong"}))
    honest.offer(offer(1, b"still here"))
    assert take(honest, 0, 1)[0].body.round == 1


def test_a_taken_port_is_an_error(
    make_swarm: Callable[..., Swarm], make_genesis: MakeGenesis, key: Ed25519PrivateKey
) -> None:
    swarm = make_swarm()
    other = swarm.folder / "other"
    port = int(swarm.ticket.addresses[0].rsplit("/", 1)[1])
    other.mkdir()
    save(key, other / "key")
    genesis = make_genesis()
    with pytest.raises(ConfigError, match=f"port {port} is taken"), ServerThread(other, genesis, port=port):
        pass
    with pytest.raises(ConfigError, match=f"port {port} is taken"):
        swarm.link("node", port=port).open()


def test_a_dead_ticket_fails_within_a_bounded_time(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm()
    # TEST-NET-1 never answers; the other one refuses.
    dead = swarm.ticket.model_copy(update={"addresses": ("/ip4/192.0.2.1/tcp/9", "/ip4/127.0.0.1/tcp/1")})
    started_s = time.monotonic()
    with pytest.raises(SwarmUnreachable) as caught:
        swarm.link("node", dead).open()
    assert time.monotonic() - started_s < 60
    assert "/ip4/192.0.2.1/tcp/9: " in str(caught.value)
    assert "/ip4/127.0.0.1/tcp/1: connection refused" in str(caught.value)


def test_a_second_node_with_the_same_identity_ends_the_first(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm()
    first = swarm.trainer("same")
    swarm.trainer("same")
    with pytest.raises(ConfigError, match="another node with this identity"):
        take(first, 0, 1)


def test_a_payload_that_the_disk_does_not_take_is_sent_again_while_its_round_is_open(
    make_swarm: Callable[..., Swarm],
) -> None:
    swarm = make_swarm(min_peers=1)
    node = swarm.trainer("node")
    blobs = swarm.folder / "coordinator" / "blobs"
    blobs.rename(swarm.folder / "unmounted")
    node.offer(offer(1, bytes(50_000)))
    events = node.events()
    within(lambda: next(e for e in events if "not taken, trying again while it is open" in e.text))
    (swarm.folder / "unmounted").rename(blobs)
    within(lambda: next(e for e in events if "the payload of round 1 was taken now" in e.text))
    assert take(node, 0, 1)[0].body.offers[0].n_bytes == 50_000


def test_the_status_can_be_asked_again_and_again(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1)
    a = swarm.trainer("a")
    with StatusClient(swarm.ticket.line()) as client:
        assert client.fetch()["round"] == 0
        a.offer(offer(1, b"x"))
        take(a, 0, 1)
        status = client.fetch()
    assert status["round"] == 1
    assert status["peers"][0]["peer_id"] == a.peer_id


def test_who_has_worked_comes_back_among_strangers_that_say_nothing(
    make_swarm: Callable[..., Swarm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "MAX_STRANGERS", 2)
    swarm = make_swarm(min_peers=1, waits=Waits(hello_s=WAIT_S))
    worker = swarm.trainer("worker")
    worker.offer(offer(1, b"work"))
    take(worker, 0, 1)
    worker.close()

    async def body(host: P2PTransport, ticket: Ticket) -> None:
        streams = [await open_stream(host, ticket, SESSION) for _ in range(3)]
        reading = [asyncio.create_task(stream.receive_message(FROM_COORDINATOR)) for stream in streams]
        (refused,), silent = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        assert isinstance(refused.exception(), EOFError | OSError)
        await asyncio.to_thread(swarm.trainer, "worker")
        for task in silent:
            task.cancel()
        for stream in streams:
            stream.close()

    swarm.speak(body)
    assert swarm.rejected() == {"strangers": 1}


# ------------------------------------------------------------------------------------------- bad input


WHOLE_BYTES = 987
"""A frame that nothing else has."""

GARBAGE = {
    "no frame": (b"GET / HTTP/1.1\r\n\r\n", "frame_kind"),
    "a length past all limits": (HEADER.pack(2**32 - 1, FrameKind.MESSAGE), "frame_size"),
    "no message": (HEADER.pack(4, FrameKind.MESSAGE) + b"\xff\xff\xff\xff", "message"),
    "half a frame": (HEADER.pack(WHOLE_BYTES, FrameKind.MESSAGE) + b"\x92", "frame_cut"),
}


@pytest.fixture
def half_came(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The coordinator has the head of that half."""
    came, read_on = threading.Event(), Stream._read_on

    async def noted(stream: Stream) -> None:
        if stream._came.startswith(HEADER.pack(WHOLE_BYTES, FrameKind.MESSAGE)):
            came.set()
        await read_on(stream)

    monkeypatch.setattr(Stream, "_read_on", noted)
    return came


@pytest.mark.parametrize("welcomed", [False, True])
def test_garbage_closes_one_session_and_disturbs_nobody(
    make_swarm: Callable[..., Swarm], half_came: threading.Event, welcomed: bool
) -> None:
    swarm = make_swarm(min_peers=1)
    honest = swarm.trainer("honest")
    for n, (data, reason) in enumerate(GARBAGE.values(), 1):

        async def send(host: P2PTransport, ticket: Ticket, data: bytes = data, reason: str = reason) -> None:
            stream = await open_stream(host, ticket, SESSION)
            if welcomed:
                await stream.send_message(hello(ticket))
                assert isinstance(await stream.receive_message(FROM_COORDINATOR), Welcome)
            stream._writer.write(data)
            if reason == "frame_cut":
                assert await asyncio.to_thread(half_came.wait, WAIT_S)  # closing may overtake it
                stream.close()
                return
            said = [m for m in await until_refused(stream) if isinstance(m, Refused)]
            assert [m.error for m in said] == ["BadMessage"]

        swarm.speak(send)
        assert eventually(lambda reason=reason: swarm.rejected().get(reason) == 1)  # type: ignore[misc]
        honest.offer(offer(n, b"undisturbed"))
        assert take(honest, n - 1, 1)[0].body.round == n


def test_messages_out_of_place_are_refused(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm()

    async def body(host: P2PTransport, ticket: Ticket) -> None:
        stream = await open_stream(host, ticket, SESSION)
        await stream.send_message(offer(1, b"before hello"))
        (refused,) = await until_refused(stream)
        assert isinstance(refused, Refused)
        assert "starts with Hello" in refused.text
        stream = await open_stream(host, ticket, SESSION)
        await stream.send_message(hello(ticket))
        await stream.send_message(hello(ticket))
        last = (await until_refused(stream))[-1]
        assert isinstance(last, Refused)
        assert "Hello is not for" in last.text

    swarm.speak(body)


def test_idle_strangers_do_not_keep_others_out(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(Waits(hello_s=3.0), min_peers=1)  # on a busy machine, too, all have come by then

    async def body(host: P2PTransport, ticket: Ticket) -> None:
        silent = [await open_stream(host, ticket, SESSION) for _ in range(12)]
        honest = await asyncio.to_thread(swarm.trainer, "honest")
        assert honest.head == 0
        for stream in silent:
            await stream.ended(WAIT_S)
            assert stream.is_closing
        assert swarm.rejected()["strangers"] == 4  # 8 of one peer may be silent at a time

    swarm.speak(body)


def test_replayed_and_wrong_offers_count_once_or_never(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1, max_payload_bytes=20_000)
    a = swarm.trainer("a")
    a.offer(offer(1, b"one"))
    take(a, 0, 1)
    a.offer(offer(1, b"one"))  # replayed
    a.offer(offer(3, b"three"))  # too early
    a.offer(offer(2, b"two"))
    commit = take(a, 1, 1)[0]
    assert [entry.payload for entry in commit.body.offers] == [b"two"]
    assert swarm.rejected() == {"wrong_round": 1}
    a.offer(offer(3, b"x" * 20_001))  # over the run's limit: the session is closed, a new one goes on
    assert eventually(lambda: swarm.rejected().get("oversized", 0) > 0)
    a.offer(offer(3, b"x" * 20_000))
    events = (event.text for event in a.events())
    assert within(lambda: next(text for text in events if "20001 bytes" in text))
    assert within(lambda: next(text for text in events if "connected again" in text))
    a.offer(offer(3, b"x" * 20_000))
    assert take(a, 2, 1)[0].body.offers[0].n_bytes == 20_000


def test_an_offer_that_its_peer_has_not_signed_ends_the_session(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1)
    honest = swarm.trainer("honest")

    async def body(host: P2PTransport, ticket: Ticket) -> None:
        stream = await open_stream(host, ticket, SESSION)
        await stream.send_message(hello(ticket))
        await stream.send_message(signed(offer(1, b"another's work"), ticket.run_id, new_key()))
        last = (await until_refused(stream))[-1]
        assert isinstance(last, Refused)
        assert last.text == "the offer of round 1 is not signed by its peer"

    swarm.speak(body)
    assert swarm.rejected() == {"signature": 1}
    honest.offer(offer(1, b"its own"))
    (commit,) = take(honest, 0, 1)
    assert [entry.payload for entry in commit.body.offers] == [b"its own"]
    work = honest.fetch(commit.body.work, 64)
    assert check_work(swarm.ticket.run_id, commit.body, work, {0: honest.peer_id}) == []


def test_strangers_get_and_store_no_blobs(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1)
    a = swarm.trainer("a")
    blob = b"b" * 10_000
    a.offer(offer(1, blob))
    take(a, 0, 1)
    a.serve(Chunk(b"replica"))

    async def body(host: P2PTransport, ticket: Ticket) -> None:
        stream = await open_stream(host, ticket, BLOB)
        with pytest.raises(NotServed, match="only members"):
            await get_blob(stream, digest_of(blob), 10_000, "payload")
        stream = await open_stream(host, ticket, BLOB)
        with pytest.raises(NotServed, match="only members"):
            await put_blob(stream, digest_of(b"mine"), b"mine", "payload")
        (address,) = swarm.coordinator.call(lambda server: server.service._parts.announcer.addresses[0])
        await host.dial(a.peer_id, [address], 5)
        reader, writer = await host.open_stream(a.peer_id, BLOB)
        with pytest.raises(NotServed, match="only members"):
            await get_blob(Stream(reader, writer, Meter()), digest_of(b"replica"), 100, "payload")

    swarm.speak(body)
    assert swarm.rejected()["stranger"] == 2


def test_members_store_no_more_than_the_limits_allow(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(max_payload_bytes=10_000)

    async def body(host: P2PTransport, ticket: Ticket) -> None:
        session = await open_stream(host, ticket, SESSION)
        await session.send_message(hello(ticket))
        assert isinstance(await session.receive_message(FROM_COORDINATOR), Welcome)
        stream = await open_stream(host, ticket, BLOB)
        with pytest.raises(NotServed, match="10001 bytes"):
            await put_blob(stream, digest_of(b"x" * 10_001), b"x" * 10_001, "payload")
        for n in range(4):
            await put_blob(stream, digest_of(bytes([n]) * 10_000), bytes([n]) * 10_000, "payload")
        with pytest.raises(NotServed, match="since the last commit"):
            await put_blob(stream, digest_of(b"one more"), b"one more", "payload")
        with pytest.raises(NotServed, match="digest"):
            await put_blob(await open_stream(host, ticket, BLOB), digest_of(b"right"), b"", "payload")

    swarm.speak(body)


# -------------------------------------------------------------------------------------------- bytes


def test_counted_bytes_are_the_bytes_of_the_frames(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=2, max_payload_bytes=2**20)
    a, b = swarm.trainer("a"), swarm.trainer("b")
    small = os.urandom(16)
    commits = []
    for round_ in range(1, 6):
        large = os.urandom(300_000)
        a.offer(offer(round_, large))
        b.offer(offer(round_, small))
        commits += take(b, round_ - 1, 1)
        take(a, round_ - 1, 1)
        counted = commits[-1].body.offers[0]
        assert within(lambda entry=counted: b.payload(entry)) == large
    sent, received = a.traffic().sent, b.traffic().received
    # Each goes to the coordinator once, and to b once, from it or from a.
    meter = swarm.coordinator.call(lambda server: server.meter)
    assert sent["payload"] + meter.sent["payload"] == pytest.approx(3_000_000, rel=0.05)
    assert b.traffic().sent["payload"] == 5 * 16
    assert b.traffic().sent["control"] < 1500
    assert received["payload"] == pytest.approx(1_500_000, rel=0.05)
    genesis = swarm.coordinator.call(lambda server: len(server.ledger.genesis_record))
    ledger = genesis + 150 + sum(len(encode_message(commit)) + HEADER.size for commit in commits)
    assert received["ledger"] == pytest.approx(ledger, rel=0.05)

    def everything(direction: int) -> int:
        nodes = ((t.sent, t.received)[direction] for t in (a.traffic(), b.traffic()))
        return meter.totals()[direction] + sum(sum(by_kind.values()) for by_kind in nodes)

    assert eventually(lambda: everything(0) == pytest.approx(everything(1), rel=0.01))
    assert meter.received["payload"] == pytest.approx(1_500_000 + 5 * 16, rel=0.05)


# ------------------------------------------------------------------------------------------ breaks


_COORDINATOR = """
import asyncio, signal, sys
from pathlib import Path
from thinwire.coordinator.protocol.messages import GenesisBody, decode_record
from thinwire.coordinator.server import CoordinatorServer
from thinwire.coordinator.state import StateDir

async def main():
    folder = Path(sys.argv[1])
    with StateDir(folder) as state:
        new = not state.ledger_path.exists()
        genesis = decode_record(GenesisBody, (folder / "genesis").read_bytes()) if new else None
        server = CoordinatorServer(state, genesis=genesis, host="127.0.0.1")
        await server.start()
        print(server.ticket.line(), flush=True)
        try:
            await server.run_until_finished()
        finally:
            await server.stop()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
"""


class Process:
    """A coordinator in a process of its own, which can be killed."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COORDINATOR, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.ticket = Ticket.parse(self.process.stdout.readline())

    def end(self, how: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(how)
        code = self.process.wait(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def ended_at_last(processes: list[Process]) -> Iterator[list[Process]]:
    """Ends the newest of the processes."""
    yield processes
    processes[-1].end()


@pytest.fixture
def heartbeat_s() -> float:
    return 1.0


@pytest.fixture
def coordinator_folder(
    tmp_path: Path, make_genesis: MakeGenesis, key: Ed25519PrivateKey, heartbeat_s: float
) -> Path:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    save(key, folder / "key")
    genesis = make_genesis(min_peers=2, rounds=100, heartbeat_s=heartbeat_s)
    write_aside(folder / "genesis", encode_record(genesis))
    return folder


@pytest.mark.parametrize("heartbeat_s", [10.0])  # however long a node takes to come back, it is waited for
def test_a_killed_coordinator_comes_back_and_nothing_is_lost(
    coordinator_folder: Path, tmp_path: Path, stack: ExitStack
) -> None:
    first = Process(coordinator_folder)
    running = stack.enter_context(ended_at_last([first]))
    links = [HivemindLink(first.ticket, state=tmp_path / n, host="127.0.0.1") for n in ("a", "b")]
    for link in links:
        stack.callback(link.close)
        link.open()
        link.state(NodeState.TRAINING)
    before: list[Commit] = []
    streams = [link.commits(0) for link in links]
    for round_ in range(1, 4):
        for n, link in enumerate(links):
            link.offer(offer(round_, bytes([round_, n]) * 3000))
        before += [within(lambda s=s: next(s)) for s in streams][:1]
    links[0].offer(offer(4, b"made before the crash"))
    first.end(signal.SIGKILL)
    links[1].offer(offer(4, b"made meanwhile"))
    text = within(lambda: next(e.text for e in links[0].events() if "trying again" in e.text))
    assert "the coordinator does not answer" in text
    assert "training state is kept" in text

    second = Process(coordinator_folder)
    running.append(second)
    assert second.ticket == first.ticket
    after = [within(lambda s=s: next(s)) for s in streams]
    assert after[0].digest == after[1].digest
    assert [e.payload for e in after[0].body.offers] == [b"made before the crash", b"made meanwhile"]
    assert after[0].body.parent == before[-1].digest
    late = HivemindLink(second.ticket, host="127.0.0.1")
    stack.callback(late.close)
    late.open()
    assert [c.digest for c in take(late, 0, 4)] == [c.digest for c in [*before, after[0]]]
    payload = bytes([2, 1]) * 3000
    assert within(lambda: late.fetch(digest_of(payload), len(payload))) == payload


def test_patience_ends(coordinator_folder: Path, tmp_path: Path, stack: ExitStack) -> None:
    coordinator = Process(coordinator_folder)
    stack.callback(coordinator.process.kill)
    link = HivemindLink(coordinator.ticket, state=tmp_path / "a", host="127.0.0.1", patience_s=1.0)
    stack.callback(link.close)
    link.open()
    assert coordinator.end() == 0
    with pytest.raises(SwarmUnreachable, match="has not answered for"):
        take(link, 0, 1)
    with pytest.raises(SwarmUnreachable):
        within(lambda: link.fetch(digest_of(b"x"), 1))


def test_a_coordinator_that_is_stopped_for_a_while_is_waited_for(
    coordinator_folder: Path, tmp_path: Path, stack: ExitStack
) -> None:
    coordinator = Process(coordinator_folder)
    stack.callback(coordinator.end)
    links = [HivemindLink(coordinator.ticket, state=tmp_path / n, host="127.0.0.1") for n in ("a", "b")]
    for link in links:
        stack.callback(link.close)
        link.open()
        link.state(NodeState.TRAINING)
    coordinator.process.send_signal(signal.SIGSTOP)
    for link in links:
        link.offer(offer(1, b"x" * 5000))
    event = within(lambda: next(e.text for e in links[0].events() if "silent for" in e.text))
    assert "training state is kept" in event
    coordinator.process.send_signal(signal.SIGCONT)
    assert len(take(links[0], 0, 1)[0].body.offers) == 2


def test_every_process_of_libp2p_may_die(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=2, rounds=100)
    a, b = swarm.trainer("a"), swarm.trainer("b")
    daemons = [
        lambda: a._core._coordinator._transport.daemon.pid,  # type: ignore[union-attr]
        lambda: swarm.coordinator.call(lambda server: server._transport.daemon.pid),  # type: ignore[union-attr]
    ]
    round_ = 1
    for daemon_pid in daemons:
        os.kill(daemon_pid(), signal.SIGKILL)
        # Who is back late misses a round, as after every break.
        while True:
            for link in (a, b):
                link.offer(offer(round_, b"y" * 5000))
            commits = [take(link, round_ - 1, 1)[0] for link in (a, b)]
            assert commits[0].digest == commits[1].digest
            round_ += 1
            if len(commits[0].body.offers) == 2:
                break


_NODE = """
import sys
from pathlib import Path
from thinwire.coordinator.protocol.messages import NodeState
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.links.hivemind import HivemindLink

link = HivemindLink(Ticket.parse(sys.argv[1]), state=Path(sys.argv[2]), host="127.0.0.1")
link.open()
link.state(NodeState.TRAINING)
print(link.peer_id, flush=True)
for commit in link.commits(0):
    print(commit.body.round, flush=True)
"""


def start_node(ticket: Ticket, state: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _NODE, ticket.line(), str(state)], stdout=subprocess.PIPE, text=True
    )


def test_a_stopped_node_recovers_by_itself(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1)
    # The coordinator closes its session meanwhile, as it does after 30 s of silence.
    swarm.coordinator.call(lambda server: setattr(server, "_silence_limit_s", 4.0))
    a = swarm.trainer("a")
    node = start_node(swarm.ticket, swarm.folder / "node")
    swarm.stack.callback(node.wait)
    swarm.stack.callback(node.kill)
    assert node.stdout is not None
    peer_id = node.stdout.readline().strip()
    node.send_signal(signal.SIGSTOP)

    def state() -> str:
        peers = swarm.coordinator.status()["peers"]
        return next((str(p["state"]) for p in peers if p["peer_id"] == peer_id), "gone")

    assert eventually(lambda: state() == "gone")
    for round_ in (1, 2):
        a.offer(offer(round_, b"x"))
        take(a, round_ - 1, 1)
    node.send_signal(signal.SIGCONT)
    lines = node.stdout
    assert [within(lambda: lines.readline().strip()) for _ in range(2)] == ["1", "2"]
    assert eventually(lambda: state() == "training")
    node.kill()
    node.wait()
    node.stdout.close()
    assert eventually(lambda: state() == "gone")


def test_a_slow_node_holds_up_nobody_and_gets_everything(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1, rounds=10_000, max_payload_bytes=2**20)
    a = swarm.trainer("a")
    slow = swarm.link("slow")
    slow.open()
    reader = slow.commits(0)
    threading.Thread(target=lambda: next(reader), daemon=True).start()
    for round_ in range(1, 41):
        a.offer(offer(round_, bytes([round_]) * 4096))
        take(a, round_ - 1, 1)
    rest = within(lambda: list(islice(reader, 39)))
    assert [commit.body.round for commit in rest] == list(range(2, 41))


def test_a_report_is_acknowledged_and_the_server_finishes(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(min_peers=1, rounds=1)
    a = swarm.trainer("a")
    a.offer(offer(1, b"x"))
    commit = take(a, 0, 1)[0]
    held_out = 2.0 if commit.body.evaluator == 0 else None
    assert not swarm.coordinator.call(lambda server: server.service.finished)
    a.report(Report(round=1, fingerprint=b"12345678", held_out=held_out))
    assert eventually(lambda: swarm.coordinator.call(lambda server: server._done.done()))


# ------------------------------------------------------------------------------------------ lost commits


class Restorable:
    """A coordinator that stops, goes back to an older copy of its state directory, and starts again."""

    def __init__(self, folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> None:
        self.state, self._copy = folder / "coordinator", folder / "copy"
        self.state.mkdir()
        save(key, self.state / "key")
        self.thread = ServerThread(self.state, genesis)
        self.thread.__enter__()

    def save(self) -> None:
        """A copy as it is made of a coordinator that does not run: stops it and starts it again."""
        self.stop()
        shutil.copytree(self.state, self._copy)
        self.start()

    def stop(self) -> None:
        self.thread.__exit__(None, None, None)

    def restore(self) -> None:
        """Of a coordinator that was stopped."""
        shutil.rmtree(self.state)
        shutil.copytree(self._copy, self.state)

    def start(self) -> None:
        self.thread = ServerThread(self.state)
        self.thread.__enter__()


@pytest.fixture
def restorable(
    tmp_path: Path, make_genesis: MakeGenesis, key: Ed25519PrivateKey, stack: ExitStack
) -> Restorable:
    coordinator = Restorable(tmp_path, make_genesis(min_peers=1, rounds=100), key)
    stack.callback(coordinator.stop)
    return coordinator


def joined(coordinator: Restorable, state: Path, stack: ExitStack) -> HivemindLink:
    link = HivemindLink(coordinator.thread.ticket, state=state, host="127.0.0.1")
    stack.callback(link.close)
    link.open()
    link.state(NodeState.TRAINING)
    return link


def trained(links: list[HivemindLink], rounds: range) -> list[Commit]:
    """All offer in every round, large payloads and small ones."""
    commits = []
    for round_ in rounds:
        for n, link in enumerate(links):
            link.offer(offer(round_, bytes([round_, n]) * (5 if n else 5000)))
        taken = [take(link, round_ - 1, 1)[0] for link in links]
        assert len({commit.digest for commit in taken}) == 1
        commits.append(taken[0])
    return commits


def test_a_restored_coordinator_gets_its_commits_back_from_its_nodes(
    restorable: Restorable, tmp_path: Path, stack: ExitStack
) -> None:
    links = [joined(restorable, tmp_path / "a", stack)]
    commits = trained(links, range(1, 3))
    restorable.save()
    links.append(joined(restorable, tmp_path / "b", stack))
    for round_ in range(3, 7):
        commits += trained(links, range(round_, round_ + 1))
    restorable.stop()
    restorable.restore()
    restorable.start()
    assert eventually(lambda: restorable.thread.status()["round"] >= 6)
    commits += trained(links, range(7, 9))
    assert [commit.body.round for commit in commits] == list(range(1, 9))
    assert commits[6].body.parent == commits[5].digest
    late = joined(restorable, tmp_path / "late", stack)
    assert [c.digest for c in take(late, 0, 8)] == [c.digest for c in commits]
    assert eventually(
        lambda: [peer["state"] for peer in restorable.thread.status()["peers"]] == ["training"] * 3
    )
    status = restorable.thread.status()
    assert status["rejected"].keys() <= {"stranger"}, "blob streams may have been faster than sessions"


def test_a_fork_stops_the_node(restorable: Restorable, tmp_path: Path, stack: ExitStack) -> None:
    a = joined(restorable, tmp_path / "a", stack)
    restorable.save()
    trained([a], range(1, 4))
    restorable.stop()
    a.close()
    restorable.restore()
    restorable.start()
    b = joined(restorable, tmp_path / "b", stack)
    ours = trained([b], range(1, 3))
    with pytest.raises(LedgerCorrupt, match="round 3 of the node follows another round 2"):
        joined(restorable, tmp_path / "a", stack)
    ours += trained([b], range(3, 4))
    with pytest.raises(LedgerCorrupt, match=r"round 3 is not on .* another record has its place"):
        joined(restorable, tmp_path / "a", stack)
    assert trained([b], range(4, 5))[0].body.parent == ours[2].digest
    assert restorable.thread.status()["rejected"] == {"fork": 1, "head": 1}


def test_whoever_claims_to_have_more_and_has_not_is_refused(make_swarm: Callable[..., Swarm]) -> None:
    swarm = make_swarm(Waits(stall_s=3.0), min_peers=1)
    honest = swarm.trainer("honest")
    honest.offer(offer(1, b"before"))
    (first,) = take(honest, 0, 1)
    forger = new_key()
    body = first.body.model_copy(update={"round": 2, "parent": first.digest})
    forged = Commit(record=encode_record(body), signature=forger.sign(encode_record(body)))
    claims: list[tuple[Message | None, str]] = [
        (forged, "BadMessage"),
        (first, "BadMessage"),
        (offer(2, b"no commit"), "BadMessage"),
        (None, "SwarmUnreachable"),
    ]

    async def body_of(host: P2PTransport, ticket: Ticket) -> None:
        for message, error in claims:
            stream = await open_stream(host, ticket, SESSION)
            await stream.send_message(hello(ticket, head_round=9, head_digest=bytes(32)))
            assert await stream.receive_message(FROM_COORDINATOR) == Follow(after=1)
            if message is not None:
                await stream.send_message(message)
            said = await until_refused(stream)
            assert [m.error for m in said if isinstance(m, Refused)] == [error]

    async def again(host: P2PTransport, ticket: Ticket) -> None:
        stream = await open_stream(host, ticket, SESSION)
        await stream.send_message(hello(ticket, head_round=9, head_digest=bytes(32)))
        (said,) = await until_refused(stream)
        assert isinstance(said, Refused)
        assert "did not come: they are asked for again in" in said.text

    swarm.speak(body_of)
    swarm.speak(again)
    honest.offer(offer(2, b"after"))
    assert take(honest, 1, 1)[0].body.parent == first.digest
    assert swarm.rejected() == {"adopt": 3}
