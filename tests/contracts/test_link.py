"""One suite over every link: what a node may rely on, whatever carries its messages.

A row is a factory: given a folder, record 0 and the coordinator's key it starts a swarm and makes links.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import ConfigError, Incompatible, LedgerCorrupt, SwarmUnreachable
from thinwire.coordinator.identity import save
from thinwire.coordinator.messages import (
    INLINE_BYTES,
    BlobRef,
    Commit,
    GenesisBody,
    NodeState,
    Offer,
    Report,
    digest_of,
)
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.ticket import Ticket
from thinwire.node.link import Link
from thinwire.node.link_hivemind import HivemindLink
from thinwire.node.link_local import LocalLink, LocalSwarm, local_swarm

WAIT_S = 20.0

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
            link.open(None, None)
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


@pytest.fixture(params=["local", pytest.param("hivemind", marks=pytest.mark.swarm)])
def make_swarm(
    request: pytest.FixtureRequest, tmp_path: Path, make_genesis: Any, key: Ed25519PrivateKey
) -> Iterator[MakeSwarm]:
    """Starts the row's swarm; arguments are those of `make_genesis`."""
    with ExitStack() as stack:

        def make(**config: Any) -> Swarm:
            genesis = make_genesis(**config)
            genesis = genesis.model_copy(
                update={"held_out": BlobRef(digest=digest_of(HELD_OUT), n_bytes=len(HELD_OUT))}
            )
            return Swarm(stack.enter_context(ROWS[request.param](tmp_path, genesis, key)), stack)

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


def within(what: Callable[[], Any]) -> Any:
    """The result of `what`, run in a thread of its own for at most WAIT_S."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(what())
        except BaseException as e:  # noqa: BLE001 - handed on to the test
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "still waiting"
    if errors:
        raise errors[0]
    return result[0]


def counted(commit: Commit) -> list[int]:
    return [entry.peer for entry in commit.body.offers]


# ------------------------------------------------------------------------------------------------ sessions


def test_open_tells_the_run_and_where_it_stands(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.link("a"), swarm.link("b")
    first, second = a.open(None, None), b.open(None, None)
    assert (first.peer_index, second.peer_index) == (0, 1)
    assert digest_of(first.genesis) == a.run_id == first.head_digest
    assert first.head_round == a.head == 0
    assert first.body.config == second.body.config
    assert a.peer_id != b.peer_id


def test_a_wrong_token_is_refused_and_disturbs_nobody(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    with pytest.raises(ConfigError, match="token"):
        swarm.started.stranger("x").open(None, None)
    a.offer(offer(1, b"still here"))
    assert counted(take(a, 0, 1)[0]) == [0]
    assert swarm.started.status()["rejected"]["token"] == 1


def test_a_full_swarm_is_incompatible(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(max_peers=2)
    swarm.trainers("a", "b")
    with pytest.raises(Incompatible, match="full"):
        swarm.link("c").open(None, None)


def test_a_head_that_is_not_on_the_chain_is_ledger_corrupt(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (a,) = swarm.trainers("a")
    a.offer(offer(1, b"x"))
    commit = take(a, 0, 1)[0]
    with pytest.raises(LedgerCorrupt):
        swarm.link("b").open(1, bytes(32))
    assert swarm.link("c").open(1, commit.digest).head_round == 1


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
    assert within(lambda: a.fetch(digest_of(large))) == large
    assert within(lambda: b.fetch(digest_of(large))) == large


def test_an_unknown_blob_is_unreachable(make_swarm: MakeSwarm) -> None:
    (a,) = make_swarm(min_peers=1).trainers("a")
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(b"nobody has this")))


def test_the_run_s_own_blobs_are_served_before_anybody_trains(make_swarm: MakeSwarm) -> None:
    link = make_swarm().link("a")
    ref = link.open(None, None).body.held_out
    assert ref is not None
    assert within(lambda: link.fetch(ref.digest)) == HELD_OUT


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
    slow.open(None, None)
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
    guest.open(None, None)
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
    assert late.open(None, None).head_round == 80
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
    joiner.open(None, None)
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
    assert again.open(None, None).peer_index == 0
    again.state(NodeState.TRAINING)
    again.offer(offer(1, b"again"))
    b.offer(offer(1, b"b"))
    commit = take(again, 0, 1)[0]
    assert [entry.payload for entry in commit.body.offers] == [b"again", b"b"]
    assert a.peer_id == again.peer_id


# ------------------------------------------------------------------------------------- snapshots and reports


def serve_snapshots(link: Link, blob: bytes, round_: int, stop: threading.Event) -> threading.Thread:
    """What a node does between two rounds: looks whether its replica is wanted."""

    def serve() -> None:
        while not stop.wait(0.01):
            if link.wanted_snapshot():
                digest = link.publish(blob)
                link.report(Report(round=round_, snapshot=digest, snapshot_bytes=len(blob)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_a_joiner_fetches_a_snapshot_from_another_node(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    (donor,) = swarm.trainers("donor")
    donor.offer(offer(1, b"x"))
    take(donor, 0, 1)
    replica, stop = bytes(range(256)) * 2000, threading.Event()
    server = serve_snapshots(donor, replica, 1, stop)
    joiner = swarm.link("joiner")
    joiner.open(None, None)
    ref = within(joiner.snapshot)
    assert (ref.round, ref.digest, ref.n_bytes) == (1, digest_of(replica), len(replica))
    assert ref.holder == donor.peer_id
    assert within(lambda: joiner.fetch(ref.digest, ref.holder)) == replica
    stop.set()
    server.join()
    assert joiner.traffic().received["snapshot"] >= len(replica)
    assert not donor.wanted_snapshot()


def test_without_a_donor_there_is_no_snapshot(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    joiner, other = swarm.link("joiner"), swarm.link("other")
    joiner.open(None, None)
    other.open(None, None)
    assert within(joiner.snapshot) is None


def test_a_donor_that_dies_is_replaced(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    silent, helpful = swarm.trainers("silent", "helpful")
    for link in (silent, helpful):
        link.offer(offer(1, b"x"))
    take(helpful, 0, 1)
    joiner = swarm.link("joiner")
    joiner.open(None, None)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(joiner.snapshot()), daemon=True)
    asking.start()
    swarm.until(silent.wanted_snapshot)
    stop = threading.Event()
    server = serve_snapshots(helpful, b"replica", 1, stop)
    swarm.started.kill(silent)
    asking.join(WAIT_S)
    stop.set()
    server.join()
    assert answers[0].holder == helpful.peer_id


def test_a_blob_that_a_node_does_not_serve_is_unreachable(make_swarm: MakeSwarm) -> None:
    a, b = make_swarm().trainers("a", "b")
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(b"unpublished"), b.peer_id))


def test_a_node_serves_its_two_newest_blobs(make_swarm: MakeSwarm) -> None:
    a, b = make_swarm().trainers("a", "b")
    blobs = [bytes([i]) * 10_000 for i in range(3)]
    for blob in blobs:
        assert b.publish(blob) == digest_of(blob)
    assert within(lambda: a.fetch(digest_of(blobs[1]), b.peer_id)) == blobs[1]
    assert within(lambda: a.fetch(digest_of(blobs[2]), b.peer_id)) == blobs[2]
    with pytest.raises(SwarmUnreachable):
        within(lambda: a.fetch(digest_of(blobs[0]), b.peer_id))


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


def test_leaving_is_told(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    swarm.until(lambda: swarm.peer(b)["state"] == "training")
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


def test_close_from_another_thread_ends_a_wait_for_a_snapshot(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm(min_peers=1)
    swarm.trainers("busy")
    joiner = swarm.link("joiner")
    joiner.open(None, None)
    closer = threading.Timer(0.1, joiner.close)
    closer.start()
    assert within(joiner.snapshot) is None
    closer.join()


def test_traffic_is_counted_by_kind(make_swarm: MakeSwarm) -> None:
    swarm = make_swarm()
    a, b = swarm.trainers("a", "b")
    large, small = b"l" * 100_000, b"s" * 100
    before = b.traffic().received
    a.offer(offer(1, large))
    b.offer(offer(1, small))
    commit = take(b, 0, 1)[0]
    within(lambda: b.fetch(digest_of(large)))
    after = b.traffic()
    assert len(large) <= after.received["payload"] - before.get("payload", 0) <= 1.01 * len(large)
    assert after.sent["payload"] == len(small)
    assert after.received["ledger"] >= len(commit.record)
    assert 0 < after.sent["control"] < 2000
    assert set(after.sent) | set(after.received) <= {"payload", "snapshot", "ledger", "control"}
    assert a.traffic().sent["payload"] >= len(large)
