"""What a link on libp2p does beyond the contract: its copy of the ledger, early payloads, lost commits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import ConfigError, LedgerCorrupt, SwarmUnreachable
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.blob_streams import get_blob
from thinwire.coordinator.protocol.identity import peer_id_of, save
from thinwire.coordinator.protocol.ledger_copy import COPY_NAME, LedgerCopy
from thinwire.coordinator.protocol.messages import (
    INLINE_BYTES,
    MAX_ROUND,
    Commit,
    GenesisBody,
    NodeState,
    Offer,
    Report,
)
from thinwire.coordinator.protocol.streams import Stream
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.server import CoordinatorServer
from thinwire.coordinator.server_thread import ServerThread
from thinwire.node.links import blob_client, coordinator_session
from thinwire.node.links import payloads as payloads_module
from thinwire.node.links.hivemind import HivemindLink
from thinwire.node.links.upload_limit import UploadLimit

pytestmark = pytest.mark.swarm

WAIT_S = 30.0
LARGE = bytes(range(256)) * 800
NARROW, WIDE = 1e3, 1e9
"""Bytes per second of the coordinator's line."""


class Swarm:
    """A coordinator that can be stopped, copied and started again, and links with folders of their own."""

    def __init__(
        self, folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey, stack: ExitStack, upload: float
    ) -> None:
        self._folder, self._stack, self.key, self._upload = folder, stack, key, upload
        self.state = folder / "coordinator"
        self.state.mkdir()
        save(key, self.state / "key")
        self._coordinator: ServerThread | None = None
        self.start(genesis)
        self.ticket: Ticket = self.coordinator.ticket
        stack.callback(self.stop)

    @property
    def coordinator(self) -> ServerThread:
        assert self._coordinator is not None
        return self._coordinator

    def start(self, genesis: GenesisBody | None = None) -> None:
        make = partial(CoordinatorServer, genesis=genesis, host="127.0.0.1", upload_bytes_per_s=self._upload)
        self._coordinator = ServerThread(self.state, make=make).__enter__()

    def stop(self) -> None:
        if self._coordinator is not None:
            self._coordinator.__exit__(None, None, None)
            self._coordinator = None

    def keep_copy(self) -> None:
        """Of the coordinator's state directory, as an operator makes one; it is stopped for it."""
        self.stop()
        shutil.copytree(self.state, self._folder / "copy")
        self.start()

    def put_back(self, n_other_rounds: int = 0) -> None:
        """The older copy; other rounds than those that the nodes have follow on it."""
        self.stop()
        shutil.rmtree(self.state)
        shutil.copytree(self._folder / "copy", self.state)
        ledger = Ledger.open(self.state / "ledger.db", self.key.public_key())
        for _ in range(n_other_rounds):
            (newest,) = ledger.commits(ledger.head_round - 1, 1)
            update = {"round": ledger.head_round + 1, "parent": ledger.head_digest, "admitted": ()}
            ledger.append(newest.body.model_copy(update=update), self.key)
        ledger.close()
        self.start()

    def folder(self, name: str) -> Path:
        return self._folder / name

    def link(self, name: str, limit: UploadLimit | None = None) -> HivemindLink:
        link = HivemindLink(
            self.ticket, state=self.folder(name), host="127.0.0.1", patience_s=60, limit=limit
        )
        self._stack.callback(link.close)
        return link

    def trainer(self, name: str, limit: UploadLimit | None = None) -> HivemindLink:
        link = self.link(name, limit)
        link.open()
        link.state(NodeState.TRAINING)
        return link

    def status(self) -> dict[str, Any]:
        return self.coordinator.status()


MakeSwarm = Callable[..., Swarm]


@pytest.fixture
def make_swarm(tmp_path: Path, make_genesis: Any, key: Ed25519PrivateKey) -> Iterator[MakeSwarm]:
    with ExitStack() as stack:
        yield lambda upload=WIDE, **config: Swarm(tmp_path, make_genesis(**config), key, stack, upload)


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, "timed out"
        time.sleep(0.01)


def offer(round_: int, payload: bytes) -> Offer:
    return Offer(
        round=round_, n_samples=1, n_tokens=1, loss=1.0, n_bytes=len(payload), payload=payload, digest=None
    )


def train(link: HivemindLink, after: int, *payloads: bytes) -> list[Commit]:
    """Rounds of one peer alone."""
    done = []
    for round_, payload in enumerate(payloads, after + 1):
        link.offer(offer(round_, payload))
        done += list(islice(link.commits(round_ - 1), 1))
    return done


def test_commits_on_disk_are_not_fetched_again(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    first = swarm.trainer("a")
    commits = train(first, 0, *[b"x" * INLINE_BYTES] * 5)
    first.kill()
    again = swarm.link("a")
    assert again.run_folder == swarm.folder("a") / again.run_id.hex()[:16]
    again.open()
    assert again.head == 5
    assert list(again.records(0)) == commits
    assert again.traffic().received["ledger"] < 5 * INLINE_BYTES

    # Without a folder everything comes from the coordinator.
    stranger = HivemindLink(swarm.ticket, host="127.0.0.1")
    assert stranger.run_folder is None
    stranger.open()
    assert list(stranger.records(0)) == commits
    assert stranger.traffic().received["ledger"] > 5 * INLINE_BYTES
    stranger.close()


def test_a_link_that_has_begun_calls_nobody_before_it_is_opened(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    link, unused = swarm.link("a"), swarm.link("b")
    for one in (link, unused):
        one.begin()
    link.open()
    link.begin()
    assert link.head == 0
    unused.close()
    with pytest.raises(SwarmUnreachable, match="the link is closed"):
        unused.open()
    assert [peer["peer_id"] for peer in swarm.status()["peers"]] == [link.peer_id]


def test_another_run_s_copy_is_refused_before_anybody_is_asked(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    link = swarm.link("a")
    assert link.run_folder is not None
    path = link.run_folder / COPY_NAME
    LedgerCopy(path, bytes(32), peer_id_of(swarm.key.public_key())).close()
    with pytest.raises(ConfigError, match=str(path)):
        link.open()
    assert swarm.status()["peers"] == []


def test_a_limited_node_gives_its_payload_to_the_coordinator_alone(make_swarm: MakeSwarm) -> None:
    """Others find it there; small ones, for which there is time, come from the node."""
    swarm = make_swarm(NARROW)
    limit = UploadLimit(100_000)
    a, b = swarm.trainer("a", limit), swarm.trainer("b")
    until(lambda: a.members() == [b.peer_id] and b.members() == [a.peer_id])
    assert a.traffic().upload_bytes_per_s is None
    a.offer(offer(1, LARGE))
    b.offer(offer(1, b"small"))
    (commit,) = islice(b.commits(0), 1)
    assert [b.payload(entry) for entry in commit.body.offers] == [LARGE, b"small"]
    assert len(LARGE) <= a.traffic().sent["payload"] < 1.1 * len(LARGE)
    speed = a.traffic().upload_bytes_per_s
    assert speed is not None
    assert speed < 140_000, "half a second's worth is there at once"
    assert 0 < limit.used_ratio() <= 1.0
    a.offer(offer(2, LARGE[:20_000]))
    until(lambda: b.traffic().received["payload"] >= len(LARGE) + 20_000)
    assert a.traffic().sent["payload"] >= len(LARGE) + 2 * 20_000


def test_payloads_come_with_the_commit_and_nobody_asks(
    make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    async def counted(stream: Stream, digest: bytes, *args: Any, **options: Any) -> bytes:
        asked.append(digest)
        return await get_blob(stream, digest, *args, **options)

    monkeypatch.setattr(blob_client, "get_blob", counted)
    monkeypatch.setattr(payloads_module, "SHORT_WAIT_S", WAIT_S)
    monkeypatch.setattr(payloads_module, "LONG_WAIT_S", WAIT_S)
    swarm = make_swarm()
    a, b = swarm.trainer("a"), swarm.trainer("b")
    until(lambda: a.members() == [b.peer_id] and b.members() == [a.peer_id])
    payloads = {(n, round_): bytes([n, round_]) * 4000 for n in range(2) for round_ in range(1, 5)}
    for round_ in range(1, 5):
        for n, link in enumerate((a, b)):
            link.offer(offer(round_, payloads[n, round_]))
        for link in (a, b):
            (commit,) = islice(link.commits(round_ - 1), 1)
            got = [link.payload(entry) for entry in commit.body.offers]
            assert got == [payloads[0, round_], payloads[1, round_]]
    assert asked == []
    assert a.traffic().received["payload"] == pytest.approx(4 * 8000, rel=0.01)
    assert a.traffic().sent["payload"] == pytest.approx(4 * 8000, rel=0.01), "to the coordinator alone"
    assert a.traffic().refused == dict.fromkeys(("sender", "unannounced", "wrong", "slow"), 0)


def test_a_payload_that_comes_rounds_too_late_is_not_sent(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    a = swarm.trainer("a")
    train(a, 0, b"x", b"y", b"z")
    b = swarm.trainer("b")
    assert len(list(b.records(0))) == 3
    b.offer(offer(1, LARGE))
    until(lambda: swarm.status()["rejected"] == {"late_offer": 1})
    b.offer(offer(4, b"next"))
    a.offer(offer(4, b"next"))
    until(lambda: b.head == 4)
    assert b.traffic().sent["payload"] == len(b"next")


def test_a_payload_is_uploaded_once_where_the_coordinator_has_room(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainer("a"), swarm.trainer("b")
    until(lambda: a.members() == [b.peer_id] and b.members() == [a.peer_id])
    a.offer(offer(1, LARGE))
    until(lambda: b.traffic().received["payload"] >= len(LARGE))
    b.offer(offer(1, b"small"))
    (commit,) = islice(b.commits(0), 1)
    swarm.coordinator.call(lambda s: s.blobs.release(counted_to=MAX_ROUND, offered_to=MAX_ROUND))
    assert b.payload(commit.body.offers[0]) == LARGE
    assert a.traffic().sent["payload"] < 1.01 * len(LARGE)
    assert b.traffic().received["payload"] < 1.01 * len(LARGE)


def test_a_node_with_a_wide_line_passes_on_what_a_narrow_one_has_made(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(NARROW)
    a, b, c = (swarm.trainer(name) for name in "abc")
    until(lambda: all(len(link.members()) == 2 for link in (a, b, c)))
    for link, rate in ((a, 1000), (b, 10**9)):
        for _ in range(8):
            swarm.coordinator.call(partial(_measured, link.peer_id, rate))
    a.offer(offer(1, LARGE))
    until(lambda: c.traffic().received["payload"] >= len(LARGE))
    assert b.traffic().sent["payload"] >= len(LARGE)
    assert a.traffic().sent["payload"] < 1.01 * len(LARGE)
    for link in (b, c):
        link.offer(offer(1, b"small"))
    (commit,) = islice(c.commits(0), 1)
    swarm.coordinator.call(lambda s: s.blobs.release(counted_to=MAX_ROUND, offered_to=MAX_ROUND))
    assert c.payload(commit.body.offers[0]) == LARGE


def _measured(peer_id: str, bytes_per_s: int, server: CoordinatorServer) -> None:
    server.fanout.uploaded(peer_id, bytes_per_s, 1.0)


def test_payloads_of_the_open_round_come_from_the_peer_that_has_them(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(NARROW)
    a, b = swarm.trainer("a"), swarm.trainer("b")
    until(lambda: a.members() == [b.peer_id] and b.members() == [a.peer_id])
    a.offer(offer(1, LARGE))
    # To the coordinator, and to the peer while the round is open.
    until(lambda: a.traffic().sent["payload"] >= 2 * len(LARGE))
    until(lambda: b.traffic().received["payload"] >= len(LARGE))
    b.offer(offer(1, b"small"))
    (commit,) = islice(b.commits(0), 1)
    swarm.coordinator.call(lambda s: s.blobs.release(counted_to=MAX_ROUND, offered_to=MAX_ROUND))
    assert b.payload(commit.body.offers[0]) == LARGE
    assert b.traffic().received["payload"] < 1.01 * len(LARGE)


def test_a_restored_coordinator_gets_its_commits_back(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1, rounds=50)
    a = swarm.trainer("a")
    train(a, 0, b"1", b"2")
    swarm.keep_copy()
    train(a, 2, b"3", LARGE, *[b"x" * INLINE_BYTES] * 20)
    a.report(Report(round=24, fingerprint=b"12345678"))
    before = [c.digest for c in a.records(0)]
    assert len(before) == 24
    swarm.put_back()
    until(lambda: swarm.status()["round"] == 24)
    events = a.events()
    assert next(e for e in events if "rounds 3 to 24" in e.text).warning
    (commit,) = train(a, 24, b"25")
    assert commit.body.parent == before[-1]
    # What it had not acknowledged was said again.
    assert [(e.round, e.fingerprint) for e in commit.body.reports] == [(24, b"12345678")]

    # Who comes later finds all of it; the payload that the coordinator has lost is with its owner.
    late = swarm.link("late")
    assert late.open().head_round == 25
    records = list(late.records(0))
    assert [c.digest for c in records[:24]] == before
    assert late.payload(records[3].body.offers[0]) == LARGE


def test_a_coordinator_that_went_on_from_an_older_copy_is_told_apart(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1, rounds=50)
    a = swarm.trainer("a")
    train(a, 0, b"1", b"2")
    swarm.keep_copy()
    train(a, 2, b"3")
    swarm.put_back(n_other_rounds=2)

    # A node that runs and waits finds out, and so does one that is started again.
    with pytest.raises(LedgerCorrupt, match="restored from an older copy"):
        next(a.commits(3))
    with pytest.raises(SwarmUnreachable):
        a.fetch(bytes(32), 10)
    a.close()
    again = swarm.link("a")
    assert again.run_folder is not None
    path = again.run_folder / COPY_NAME
    with pytest.raises(LedgerCorrupt, match=f"{path}: rm it"):
        again.open()
    path.unlink()
    assert swarm.link("a").open().head_round == 4


def test_a_member_that_starts_before_its_coordinator_waits_for_it(make_swarm: MakeSwarm) -> None:
    """After a power cut nobody knows who is up first; a new node with a wrong ticket is told at once."""
    swarm = make_swarm(min_peers=1)
    trainer = swarm.trainer("node")
    train(trainer, 0, b"x")
    trainer.close()
    swarm.stop()
    with pytest.raises(SwarmUnreachable, match=r"127\.0\.0\.1"):
        swarm.link("new").open()
    waiting = swarm.link("node")
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(waiting.open)
        event = next(waiting.events())
        assert "the coordinator does not answer" in event.text
        swarm.start()
        assert opening.result(WAIT_S).head_round == 1


def test_nobody_says_goodbye_to_a_coordinator_that_is_gone(
    make_swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that went before, nor one that goes meanwhile is waited for."""
    monkeypatch.setattr(coordinator_session, "GOODBYE_S", 60.0)
    swarm = make_swarm(min_peers=1)
    first = swarm.trainer("a")
    train(first, 0, b"x")
    swarm.stop()
    until(lambda: any("trying again" in event.text for event in first.events()))
    began_s = time.monotonic()
    first.close()
    assert time.monotonic() - began_s < 30
