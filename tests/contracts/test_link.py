"""One suite over every link: what a node may rely on, whatever carries its messages.

A row is a factory: given a folder, record 0 and the coordinator's key it starts a swarm and makes links.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.ray_cluster import ManyRuns, local_ray
from tests.support.waiting import WAIT_S, eventually, within
from thinwire.compression.errors import ConfigError, Incompatible, SwarmUnreachable
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.blob_streams import Base
from thinwire.coordinator.protocol.identity import save
from thinwire.coordinator.protocol.messages import (
    INLINE_BYTES,
    MAX_ROUND,
    AuditEntry,
    BlobRef,
    Commit,
    GenesisBody,
    NodeState,
    Offer,
    Report,
    Verdict,
    digest_of,
)
from thinwire.coordinator.protocol.settings import AuditsSection
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.protocol.trust.audits import check_audit, signed_bytes
from thinwire.coordinator.protocol.trust.standing import Standing
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.state import StateDir
from thinwire.node.gossip.base import EdgeBytes, NeighbourLink
from thinwire.node.links.base import Lied, Link
from thinwire.node.links.hivemind import HivemindLink
from thinwire.node.links.local import LocalLink, LocalSwarm, local_swarm
from thinwire.node.on_ray.link import RayLink
from thinwire.node.on_ray.transport import COORDINATOR

HELD_OUT = b"the text that a run is measured on" * 300


class Started(Protocol):
    """A running coordinator of one run, and ways to reach it."""

    def link(self, name: str) -> Link:
        """A link of the peer with this name (the same key each time), not open yet."""
        ...

    def stranger(self, name: str) -> Link:
        """A link whose ticket has a wrong token."""
        ...

    def kill(self, link: Link) -> None:
        """Ends the link as a crash of its process would: without a word."""
        ...

    def forget_payloads(self) -> None:
        """The coordinator has none of them any more."""
        ...

    def status(self) -> dict[str, Any]: ...


Row = Callable[[Path, GenesisBody, Ed25519PrivateKey], AbstractContextManager[Started]]


class LocalRow:
    def __init__(self, swarm: LocalSwarm) -> None:
        self._swarm = swarm

    def link(self, name: str) -> Link:
        return self._swarm.link(name)

    def stranger(self, name: str) -> Link:
        return self._swarm.link(name, token="wrong")

    def kill(self, link: Link) -> None:
        assert isinstance(link, LocalLink)
        link.kill()

    def forget_payloads(self) -> None:
        with self._swarm.changed:
            self._swarm.blobs.release(counted_to=MAX_ROUND, offered_to=MAX_ROUND)

    def status(self) -> dict[str, Any]:
        return self._swarm.call(lambda service, now_s: service.status(now_s))


@contextmanager
def local(folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> Iterator[Started]:
    with local_swarm(folder, genesis, key, blobs=[HELD_OUT]) as swarm:
        yield LocalRow(swarm)


class HivemindRow:
    """Real libp2p on loopback; every link has its daemon."""

    def __init__(self, folder: Path, coordinator: ServerThread) -> None:
        self._folder, self._coordinator = folder, coordinator

    def link(self, name: str) -> Link:
        return self._link(name, self._coordinator.ticket)

    def stranger(self, name: str) -> Link:
        return self._link(name, self._coordinator.ticket.model_copy(update={"token": "wrong"}))

    def kill(self, link: Link) -> None:
        assert isinstance(link, HivemindLink)
        link.kill()

    def forget_payloads(self) -> None:
        self._coordinator.call(
            lambda server: server.blobs.release(counted_to=MAX_ROUND, offered_to=MAX_ROUND)
        )

    def status(self) -> dict[str, Any]:
        return self._coordinator.status()

    def _link(self, name: str, ticket: Ticket) -> Link:
        return HivemindLink(ticket, state=self._folder / name, host="127.0.0.1")


@contextmanager
def hivemind(folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> Iterator[Started]:
    state = folder / "coordinator"
    state.mkdir()
    save(key, state / "key")
    with ServerThread(state, genesis, [HELD_OUT]) as coordinator:
        yield HivemindRow(folder, coordinator)


class RayRow:
    """Links in this process to an actor, over a real cluster on this machine."""

    def __init__(self, folder: Path, actor: Any, ticket: Ticket) -> None:
        self._folder, self._actor, self._ticket = folder, actor, ticket

    def link(self, name: str) -> Link:
        run_folder = self._folder / name
        run_folder.mkdir(exist_ok=True)
        return RayLink(self._ticket, name, run_folder=run_folder)

    def stranger(self, name: str) -> Link:
        return RayLink(self._ticket.model_copy(update={"token": "wrong"}), name)

    def kill(self, link: Link) -> None:
        assert isinstance(link, RayLink)
        link.kill()

    def forget_payloads(self) -> None:
        import ray

        ray.get(self._actor.forget_payloads.remote())

    def status(self) -> dict[str, Any]:
        import ray

        status: dict[str, Any] = ray.get(self._actor.status.remote())
        return status


@pytest.fixture(scope="module")
def actor() -> Iterator[Any]:
    """The coordinator's actor in a cluster of this module's own."""
    import ray

    with local_ray(num_cpus=2):
        options = {"name": COORDINATOR, "namespace": "test", "num_cpus": 0, "max_concurrency": 1000}
        yield ray.remote(ManyRuns).options(**options).remote("", "test")


def ray_row(
    actor: Any, folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey
) -> AbstractContextManager[Started]:
    import ray

    state = folder / "coordinator"
    with StateDir(state) as state_dir:
        save(key, state_dir.key_path)
        Ledger.create(state_dir.ledger_path, genesis, key).close()
        BlobStore(state_dir.blobs_path).put(digest_of(HELD_OUT), HELD_OUT)
    ticket = Ticket.parse(ray.get(actor.begin.remote(str(state))))
    return nullcontext(RayRow(folder, actor, ticket))


ROWS: dict[str, Row] = {"local": local, "hivemind": hivemind}


class Swarm:
    """A started row whose links are closed at the end of the test."""

    def __init__(self, started: Started, stack: ExitStack) -> None:
        self.started = started
        self._stack = stack

    def link(self, name: str) -> Link:
        link = self.started.link(name)
        self._stack.callback(link.close)
        return link

    def trainers(self, *names: str) -> list[Link]:
        """Open links in this order (so the first is peer 0), all training."""
        links = [self.link(name) for name in names]
        for link in links:
            link.open()
        for link in links:
            link.state(NodeState.TRAINING)
        return links

    def peer(self, link: Link) -> dict[str, Any]:
        return next(p for p in self.started.status()["peers"] if p["peer_id"] == link.peer_id)

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that the coordinator says."""
        end_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < end_s, f"timed out: {self.started.status()}"
            time.sleep(0.01)


MakeSwarm = Callable[..., Swarm]


@pytest.fixture(
    params=[
        "local",
        pytest.param("hivemind", marks=pytest.mark.swarm),
        pytest.param("ray", marks=pytest.mark.swarm),
    ]
)
def make_swarm(
    request: pytest.FixtureRequest, tmp_path: Path, make_genesis: Any, key: Ed25519PrivateKey
) -> Iterator[MakeSwarm]:
    """Starts the row's swarm; arguments are those of `make_genesis`."""
    if request.param == "ray":
        pytest.importorskip("ray", reason="the link over Ray is an extra")
        row: Row = partial(ray_row, request.getfixturevalue("actor"))
    else:
        row = ROWS[request.param]
    with ExitStack() as stack:

        def make(**config: Any) -> Swarm:
            genesis = make_genesis(**config)
            genesis = genesis.model_copy(
                update={"held_out": BlobRef(digest=digest_of(HELD_OUT), n_bytes=len(HELD_OUT))}
            )
            return Swarm(stack.enter_context(row(tmp_path, genesis, key)), stack)

        yield make


def offer(round_: int, payload: bytes) -> Offer:
    return Offer(
        round=round_,
        n_samples=4,
        n_tokens=64,
        loss=1.5,
        n_bytes=len(payload),
        payload=payload,
        digest=None,
    )


def take(link: Link, after: int, n: int) -> list[Commit]:
    """The next n commits, or a failure: nothing in this suite may wait for ever."""
    return within(lambda: list(islice(link.commits(after), n)))


def train(link: Link, n: int, after: int = 0) -> None:
    """Rounds of one peer alone."""
    for round_ in range(after + 1, after + n + 1):
        link.offer(offer(round_, b"x" * INLINE_BYTES))
        take(link, round_ - 1, 1)


def rounds_of(commits: Iterable[Commit]) -> list[int]:
    return [commit.body.round for commit in commits]


def counted(commit: Commit) -> list[int]:
    return [entry.peer for entry in commit.body.offers]


# ------------------------------------------------------------------------------------------------ sessions


def test_open_tells_the_run_and_where_it_stands(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.link("a"), swarm.link("b")
    first, second = a.open(), b.open()
    assert (first.peer_index, second.peer_index) == (0, 1)
    assert digest_of(first.genesis) == a.run_id == first.head_digest
    assert first.head_round == a.head == 0
    assert first.body.config == second.body.config
    assert a.peer_id != b.peer_id


def test_a_wrong_token_is_refused_and_disturbs_nobody(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    with pytest.raises(ConfigError, match="token"):
        swarm.started.stranger("x").open()
    a.offer(offer(1, b"still here"))
    assert counted(take(a, 0, 1)[0]) == [0]
    assert swarm.started.status()["rejected"]["token"] == 1


def test_a_full_swarm_is_incompatible(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(max_peers=2)
    swarm.trainers("a", "b")
    with pytest.raises(Incompatible, match="full"):
        swarm.link("c").open()


# -------------------------------------------------------------------------------------------------- rounds


def test_offers_become_the_same_commits_for_all_in_order(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=3)
    links = swarm.trainers("a", "b", "c")
    for round_ in range(1, 4):
        for i, link in enumerate(links):
            link.offer(offer(round_, bytes([round_, i])))
        commits = [take(link, round_ - 1, 1)[0] for link in links]
        assert len({commit.digest for commit in commits}) == 1
        assert counted(commits[0]) == [0, 1, 2]
        assert [entry.payload for entry in commits[0].body.offers] == [bytes([round_, i]) for i in range(3)]
    whole = take(links[0], 0, 3)
    assert [commit.body.round for commit in whole] == [1, 2, 3]
    assert whole[0].body.parent == links[0].run_id
    assert [commit.body.parent for commit in whole[1:]] == [commit.digest for commit in whole[:2]]
    assert [(a.index, a.peer_id) for a in whole[0].body.admitted] == [
        (i, link.peer_id) for i, link in enumerate(links)
    ]


def test_small_payloads_travel_inline_and_large_ones_as_blobs(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    small, large = b"s" * INLINE_BYTES, bytes(range(256)) * 1200
    a.offer(offer(1, small))
    b.offer(offer(1, large))
    entries = take(a, 0, 1)[0].body.offers
    assert entries[0].payload == small
    assert entries[0].digest is None
    assert entries[1].payload is None
    assert entries[1].digest == digest_of(large)
    assert entries[1].n_bytes == len(large)
    for link in (a, b):
        assert [within(partial(link.payload, entry)) for entry in entries] == [small, large]


def test_an_unknown_blob_is_unreachable(make_swarm: MakeSwarm) -> None:
    (a,) = make_swarm(min_peers=1).trainers("a")
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(b"nobody has this"), 100))


def test_the_run_s_own_blobs_are_served_before_anybody_trains(make_swarm: MakeSwarm) -> None:
    link = make_swarm().link("a")
    ref = link.open().body.held_out
    assert ref is not None
    assert within(lambda: link.fetch(ref.digest, ref.n_bytes)) == HELD_OUT
    with pytest.raises(Lied):
        within(lambda: link.fetch(ref.digest, ref.n_bytes - 1))


def test_an_offer_sent_twice_counts_once(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    a.offer(offer(1, b"a"))
    a.offer(offer(1, b"a"))
    b.offer(offer(1, b"b"))
    commit = take(a, 0, 1)[0]
    assert counted(commit) == [0, 1]
    a.offer(offer(2, b"a2"))
    b.offer(offer(2, b"b2"))
    assert counted(take(a, 1, 1)[0]) == [0, 1]
    assert swarm.started.status()["rejected"] == {}


def test_a_different_payload_for_the_same_round_is_refused(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    a.offer(offer(1, b"first"))
    a.offer(offer(1, b"second"))
    swarm.until(lambda: swarm.started.status()["rejected"] == {"changed_offer": 1})
    b.offer(offer(1, b"b"))
    assert [entry.payload for entry in take(b, 0, 1)[0].body.offers] == [b"first", b"b"]


def test_a_late_offer_is_out_for_everybody(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    slow = swarm.link("slow")
    slow.open()
    a.offer(offer(1, b"a1"))
    assert counted(take(slow, 0, 1)[0]) == [0]
    slow.offer(offer(1, b"too late"))
    swarm.until(lambda: swarm.started.status()["rejected"] == {"late_offer": 1})
    a.offer(offer(2, b"a2"))
    for link in (a, slow):
        assert [counted(commit) for commit in take(link, 0, 2)] == [[0], [0]]


def test_offers_of_peers_that_are_not_awaited_count_when_they_are_there(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    guest = swarm.link("guest")
    guest.open()
    guest.offer(offer(1, b"guest"))
    guest.offer(offer(1, b"changed: shows when the first one is there"))
    swarm.until(lambda: swarm.started.status()["rejected"] == {"changed_offer": 1})
    (a,) = swarm.trainers("a")
    a.offer(offer(1, b"a"))
    assert [entry.payload for entry in take(guest, 0, 1)[0].body.offers] == [b"guest", b"a"]
    a.offer(offer(2, b"a"))
    assert counted(take(a, 1, 1)[0]) == [1]


def test_a_late_subscriber_gets_every_commit(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1, rounds=100)
    (a,) = swarm.trainers("a")
    for round_ in range(1, 81):
        a.offer(offer(round_, bytes([round_])))
        take(a, round_ - 1, 1)
    late = swarm.link("late")
    assert late.open().head_round == 80
    commits = take(late, 0, 80)
    assert [commit.body.round for commit in commits] == list(range(1, 81))
    assert [c.body.round for c in take(late, 77, 3)] == [78, 79, 80]
    assert late.head == 80


def test_commits_can_start_at_a_snapshot_s_round(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    for round_ in (1, 2, 3):
        a.offer(offer(round_, b"x"))
        take(a, round_ - 1, 1)
    joiner = swarm.link("joiner")
    joiner.open()
    assert [c.digest for c in take(joiner, 1, 2)] == [c.digest for c in take(a, 1, 2)]


def test_the_swarm_goes_on_without_a_peer_that_died(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    for link in (a, b):
        link.offer(offer(1, b"x"))
    take(a, 0, 1)
    a.offer(offer(2, b"x"))
    swarm.started.kill(b)
    assert counted(take(a, 1, 1)[0]) == [0]
    swarm.until(lambda: swarm.peer(b)["state"] == "gone")


def test_a_new_session_takes_over_from_the_old_one(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    again = swarm.link("a")
    assert again.open().peer_index == 0
    again.state(NodeState.TRAINING)
    again.offer(offer(1, b"again"))
    b.offer(offer(1, b"b"))
    commit = take(again, 0, 1)[0]
    assert [entry.payload for entry in commit.body.offers] == [b"again", b"b"]
    assert a.peer_id == again.peer_id


# ------------------------------------------------------------------------------------------------ records


def test_records_end_at_the_head_that_is_known(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    train(a, 5)
    reader = swarm.link("reader")
    reader.open()
    assert within(lambda: rounds_of(reader.records(0))) == [1, 2, 3, 4, 5]
    assert within(lambda: rounds_of(reader.records(3))) == [4, 5]
    assert within(lambda: rounds_of(reader.records(5))) == []
    assert [c.digest for c in within(lambda: list(reader.records(0)))] == [c.digest for c in take(a, 0, 5)]
    assert rounds_of(take(reader, 3, 2)) == [4, 5]


def test_who_comes_back_goes_on_where_it_was(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    train(a, 3)
    a.close()
    (again,) = swarm.trainers("a")
    assert again.head == 3
    assert within(lambda: rounds_of(again.records(0))) == [1, 2, 3]
    train(again, 2, after=3)
    assert rounds_of(take(again, 0, 5)) == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------ blobs of members


class Shelf:
    """Blobs as a node has them on its disk; `lies`: their first byte is another one."""

    def __init__(self, *blobs: bytes, lies: bool = False) -> None:
        self._blobs = {digest_of(blob): blob for blob in blobs}
        self._lies = lies

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        blob = self._blobs[digest]
        if self._lies:
            blob = bytes([blob[0] ^ 1]) + blob[1:]
        return BytesIO(blob), len(blob)


def test_members_fetch_what_is_on_each_other_s_shelf(make_swarm: MakeSwarm) -> None:
    a, b, c = make_swarm(min_peers=3).trainers("a", "b", "c")
    blobs = [random.Random(i).randbytes(300_000) for i in range(8)]  # no fewer bytes say the same
    digests = [digest_of(blob) for blob in blobs]
    assert eventually(lambda: sorted(a.members()) == sorted([b.peer_id, c.peer_id]))

    # Nothing is on the shelf, then something, then nothing again.
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digests[0], 300_000, b.peer_id))
    b.serve(Shelf(*blobs))
    assert within(lambda: a.fetch(digests[0], 300_000, b.peer_id)) == blobs[0]
    assert a.traffic().received["snapshot"] >= 300_000
    near = Base(digests[0], blobs[0])
    b.serve(Shelf(*blobs, alike := blobs[0][:-1] + b"x"))
    assert within(lambda: a.fetch(digest_of(alike), 300_000, b.peer_id, near)) == alike
    with pytest.raises(Lied):
        within(lambda: a.fetch(digests[0], 299_999, b.peer_id))
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(b"elsewhere"), 300_000, b.peer_id))

    # Whose bytes do not fit has lied; others may have them.
    c.serve(Shelf(*blobs, lies=True))
    with pytest.raises(Lied):
        within(lambda: a.fetch(digests[1], 300_000, c.peer_id))

    # From several threads at once, and from several holders.
    c.serve(Shelf(*blobs))
    with ThreadPoolExecutor(4) as threads:
        got = threads.map(
            lambda i: a.fetch(digests[i], 300_000, (b, c)[i % 2].peer_id), range(8), timeout=WAIT_S
        )
    assert list(got) == blobs
    b.serve(None)
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digests[0], 300_000, b.peer_id))
    assert within(lambda: a.fetch(digests[0], 300_000, c.peer_id)) == blobs[0]


def test_who_is_gone_gives_nothing(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    b.serve(Shelf(b"blob"))
    assert within(lambda: a.fetch(digest_of(b"blob"), 4, b.peer_id)) == b"blob"
    swarm.started.kill(b)
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(b"blob"), 4, b.peer_id))
    assert eventually(lambda: a.members() == [])
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(b"blob"), 4, "12D3KooWnobody"))


def neighbours(link: Link) -> NeighbourLink:
    if link.neighbours is None:
        pytest.skip("this network has no streams between nodes")
    return link.neighbours


def test_neighbours_exchange_messages(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=3)
    links = swarm.trainers("a", "b", "c")
    a, b, c = map(neighbours, links)
    names = [link.peer_id for link in links]
    assert eventually(lambda: all(len(link.members()) == 2 for link in links))
    large = {name: name.encode() * 20_000 for name in names}
    for near, link in zip((a, b, c), links, strict=True):
        near.send(7, [name for name in names if name != link.peer_id], large[link.peer_id])
    for near, link in zip((a, b, c), links, strict=True):
        others = [name for name in names if name != link.peer_id]
        assert within(lambda near=near: near.received(7, names, WAIT_S)) == [(n, large[n]) for n in others]
        size = len(large[link.peer_id])
        edges = {n: EdgeBytes(sent=size, received=len(large[n])) for n in others}
        assert eventually(lambda near=near, edges=edges: near.edges() == edges)
    assert links[0].traffic().sent["gossip"] >= 2 * len(large[names[0]])
    assert sorted(within(lambda: a.latest(WAIT_S))) == sorted((7, large[n]) for n in names[1:])

    assert a.secret(names[1]) == b.secret(names[0]) != a.secret(names[2])

    # A message for the next round may come before this node gets there; one of an old round is refused.
    before = b.edges()[names[0]].sent
    b.send(8, names[:1], b"early")
    assert eventually(lambda: b.edges()[names[0]].sent == before + 5)
    a.send(8, names[1:2], b"a's")
    assert within(lambda: a.received(8, names, WAIT_S)) == [(names[1], b"early")]
    c.send(7, names[:1], b"late")
    assert eventually(lambda: a.rejected().get("round", 0) == 1)

    # Who is gone, or is not awaited, is not waited for.
    swarm.started.kill(links[2])
    assert eventually(lambda: len(links[0].members()) == 1)
    a.send(9, names[1:], b"a's")
    assert within(lambda: a.received(9, names[2:], WAIT_S)) == []


def test_a_wait_for_neighbours_is_bounded_and_ends_when_the_link_is_closed(make_swarm: MakeSwarm) -> None:
    links = make_swarm(max_payload_bytes=2**16).trainers("a", "b")
    a, b = map(neighbours, links)
    names = [link.peer_id for link in links]
    assert eventually(lambda: links[0].members() == names[1:])
    a.send(1, names[1:], b"a's")
    assert a.received(1, names, 0.05) == []
    b.send(1, names[:1], bytes(2**16 + 1))
    assert eventually(lambda: a.rejected().get("size", 0) == 1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(a.received, 1, names, 60.0)
        links[0].close()
        assert waiting.result(WAIT_S) == []


def test_a_payload_that_the_coordinator_does_not_have_comes_from_a_member(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    payload = bytes(range(256)) * 300
    a.offer(offer(1, payload))
    b.offer(offer(1, b"small"))
    (commit,) = take(b, 0, 1)
    assert within(lambda: b.payload(commit.body.offers[0])) == payload
    swarm.started.forget_payloads()
    joiner = swarm.link("joiner")
    joiner.open()
    assert [c.digest for c in within(lambda: list(joiner.records(0)))] == [commit.digest]
    with pytest.raises(SwarmUnreachable):
        within(lambda: joiner.fetch(digest_of(payload), len(payload)))
    assert within(lambda: joiner.payload(commit.body.offers[0])) == payload
    # Who offered it goes; who has fetched it stays.
    swarm.started.kill(a)
    other = swarm.link("other")
    other.open()
    assert within(lambda: other.payload(commit.body.offers[0])) == payload
    for link in (b, joiner):
        swarm.started.kill(link)
    assert eventually(lambda: other.members() == [])
    nobody = commit.body.offers[0].model_copy(update={"digest": digest_of(b"never offered")})
    with pytest.raises(SwarmUnreachable):
        within(lambda: other.payload(nobody))


def test_a_link_knows_which_payloads_are_here(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    payload = bytes(range(256)) * 300
    a.offer(offer(1, payload))
    b.offer(offer(1, b"small"))
    (commit,) = take(b, 0, 1)
    b.keep_payloads(0)
    within(lambda: b.payload(commit.body.offers[0]))
    assert [link.has_payload(digest_of(payload)) for link in (a, b)] == [True, True]
    assert not b.has_payload(digest_of(b"never offered"))


def test_what_a_joiner_needs_is_kept_for_it(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1, rounds=100, snapshot_every=1)
    (a,) = swarm.trainers("a")
    joiner = swarm.link("joiner")
    joiner.open()
    joiner.state(NodeState.JOINING, needs_after=2)
    swarm.until(lambda: swarm.peer(joiner)["state"] == "joining")
    large = bytes(INLINE_BYTES + 1)

    def train_with_snapshots(after: int, n: int) -> None:
        for round_ in range(after + 1, after + n + 1):
            payload = bytes([round_]) + large
            a.offer(offer(round_, payload))
            take(a, round_ - 1, 1)
            a.report(Report(round=round_, snapshot=digest_of(payload), snapshot_bytes=10))

    train_with_snapshots(0, 10)
    swarm.until(lambda: swarm.started.status()["payloads"]["kept_from"] == 3)
    entry = take(joiner, 2, 1)[0].body.offers[0]
    assert within(lambda: joiner.payload(entry))[0] == 3
    joiner.state(NodeState.TRAINING)
    swarm.until(lambda: swarm.peer(joiner)["state"] == "training")
    joiner.offer(offer(11, b"joiner"))
    train_with_snapshots(10, 1)
    assert swarm.started.status()["payloads"]["kept_from"] == 8


# ------------------------------------------------------------------------------------------------ reports


def test_reports_reach_the_status_and_the_next_commit(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    a.report(Report(round=0, held_out=5.5))
    for link in (a, b):
        link.offer(offer(1, b"x"))
    take(a, 0, 1)
    a.report(Report(round=1, fingerprint=b"12345678"))
    swarm.until(lambda: swarm.peer(a)["fingerprint"] == b"12345678".hex())
    for link in (a, b):
        link.offer(offer(2, b"x"))
    commit = take(b, 1, 1)[0]
    assert [(e.peer, e.round, e.fingerprint) for e in commit.body.reports] == [(0, 1, b"12345678")]
    status = swarm.started.status()
    assert status["held_out"] == [[0, 5.5]]
    assert swarm.peer(a)["fingerprint_round"] == 1
    assert swarm.peer(a)["offers_counted"] == 2
    assert status["round"] == 2


def test_audits_reach_the_next_commit_signed(make_swarm: MakeSwarm) -> None:
    rules = {"rate": 1.0, "failures": 1, "window_rounds": 10}
    swarm = make_swarm(min_peers=4, rounds=1000, audits=rules)
    links = swarm.trainers("a", "b", "c", "d")
    standing = Standing(links[0].run_id, AuditsSection(**rules))

    def play() -> Commit:
        for link in links:
            link.offer(offer(standing.round + 1, b"of " + link.peer_id.encode()))
        (commit,) = take(links[0], standing.round, 1)
        standing.committed(commit.body, commit.digest)
        return commit

    while not (draws := [d for d in standing.drawn(play().body.round) if not d.for_suspects]):
        assert standing.round < 100
    round_, draw = standing.round, draws[0]
    target = links[draw.target]
    payload = digest_of(b"of " + target.peer_id.encode())
    claim = signed_bytes(target.run_id, round_, target.peer_id, payload, Verdict.FAILED)
    for auditor in draw.auditors:
        links[auditor].audit(round_, draw.target, Verdict.FAILED, claim)
    found = list[AuditEntry]()
    while len(found) < len(draw.auditors):
        assert standing.round < round_ + 15
        found += play().body.audits
    assert {(a.round, a.target) for a in found} == {(round_, draw.target)}
    assert sorted(a.auditor for a in found) == list(draw.auditors)
    assert all(check_audit(links[a.auditor].peer_id, a.signature, claim) for a in found)
    assert standing.condemned_in(standing.round + 1) == {draw.target}
    assert swarm.started.status()["rejected"] == {}


def test_leaving_is_told(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    swarm.until(lambda: all(swarm.peer(link)["state"] == "training" for link in (a, b)))
    a.offer(offer(1, b"x"))
    b.close()
    assert counted(take(a, 0, 1)[0]) == [0]
    assert swarm.peer(b)["state"] == "gone"


# --------------------------------------------------------------------------------------- people and closing


def test_what_is_waited_for_is_told(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=3)
    (a,) = swarm.trainers("a")
    event = within(lambda: next(e for e in a.events() if "waiting for 2 more peers" in e.text))
    assert not event.warning


def test_close_wakes_commits_and_events(make_swarm: MakeSwarm) -> None:
    (a,) = make_swarm().trainers("a")
    got: list[object] = []
    threads = [
        threading.Thread(target=lambda: got.append(list(a.commits(0))), daemon=True),
        threading.Thread(target=lambda: list(a.events()) and None, daemon=True),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    a.close()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert got == [[]]
    a.close()


def test_close_from_another_thread_ends_a_wait_for_records(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    closer = threading.Timer(0.1, a.close)
    closer.start()
    assert within(lambda: list(a.commits(0))) == []
    closer.join()
    assert within(lambda: list(a.records(0))) == []
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(HELD_OUT), len(HELD_OUT)))
    assert a.members() == []


def test_traffic_is_counted_by_kind(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    large, small = b"l" * 100_000, b"s" * 100
    before = b.traffic().received
    a.offer(offer(1, large))
    b.offer(offer(1, small))
    commit = take(b, 0, 1)[0]
    within(lambda: b.payload(commit.body.offers[0]))
    after = b.traffic()
    assert len(large) <= after.received["payload"] - before.get("payload", 0) <= 1.01 * len(large)
    assert after.sent["payload"] == len(small)
    assert after.received["ledger"] >= len(commit.record)
    assert 0 < after.sent["control"] < 2000
    assert set(after.sent) | set(after.received) <= {"payload", "snapshot", "ledger", "control", "gossip"}
    assert a.traffic().sent["payload"] >= len(large)
