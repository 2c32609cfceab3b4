"""Nodes of a run with several coordinators: who leads is found, followed when it changes, and never anybody
that neither the ticket nor the ledger names.

The seat that does not lead has its real stream server; the one that leads orders the run alone, and the same
service is reached under a second identity, as another seat that leads.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.records import commit_body
from tests.support.waiting import wait_until
from thinwire.compression.errors import ConfigError, SwarmUnreachable
from thinwire.coordinator.admission import AdmissionControl
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.entry.rules import OPEN
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.blob_streams import STALL_S, Sink
from thinwire.coordinator.protocol.identity import new_key, peer_id_of, save
from thinwire.coordinator.protocol.messages import (
    READER,
    CommitteeEntry,
    Elsewhere,
    GenesisBody,
    Message,
    NodeState,
    Offer,
    SeatEntry,
    Welcome,
    digest_of,
    encode_message,
)
from thinwire.coordinator.protocol.p2p import P2PTransport, start_p2p
from thinwire.coordinator.protocol.streams import Meter, Stream
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.protocol.transport import StreamHandler
from thinwire.coordinator.seats.elsewhere import ElsewhereServer
from thinwire.coordinator.seats.reception import Reception
from thinwire.coordinator.seats.watchers import Watchers, WhoLeads
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.stream_server import Waits
from thinwire.node.cli.status import fetch_status, seat_in_words
from thinwire.node.doctor.network import NetworkPlan, check_network
from thinwire.node.links.connecting import finding
from thinwire.node.links.connecting.finding import NobodyLeads, find_leader
from thinwire.node.links.core import About
from thinwire.node.links.hivemind import HivemindLink
from thinwire.node.links.known_seats import KnownSeats
from thinwire.node.states.rejoining import ticket_in

WAIT_S = 30.0
A, B, C, STRANGER = (peer_id_of(new_key().public_key()) for _ in range(4))
BASE = b"what only one seat has" * 100


class NoSeats:
    """Pushes nothing."""

    def knows(self, peer_id: str) -> bool:
        return False

    def takes(self, seat: str, digest: bytes, n_bytes: int) -> Sink | None:
        raise AssertionError("a seat pushes")

    def taken(self, seat: str, digest: bytes) -> None:
        raise AssertionError("a seat has pushed")


class Swarm:
    """A coordinator that leads, and a seat that does not: `follower` by peer id and addresses."""

    def __init__(self, folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey, stack: ExitStack) -> None:
        self.folder, self._stack, self.key = folder, stack, key
        self.daemons: dict[str, int] = {}
        """Process ids, by peer id."""
        state = folder / "leads"
        state.mkdir()
        save(key, state / "key")
        self.leads = stack.enter_context(ServerThread(state, genesis))
        (folder / "follows").mkdir()
        self.ledger = Ledger.create(folder / "follows" / "ledger.db", genesis, key)  # record 0, the same
        stack.callback(self.ledger.close)
        self.blobs = BlobStore(folder / "follows" / "blobs")
        self.leader = _entry(self.leads.ticket)
        self.watchers = Watchers(WhoLeads(), lambda: self.ledger.head_round, 0.2)
        self.all_watchers = (self.watchers, self.leads.server.watchers)
        self.follower = self.call(self._follow())
        self.ticket = Ticket(
            peer_id=self.follower.peer_id,
            addresses=self.follower.addresses,
            run_id=self.ledger.run_id,
            token=self.leads.ticket.token,
            others=(self.leader,),
        )
        self.call(self._say(self.leader.peer_id))

    async def _follow(self) -> SeatEntry:
        transport = await self.transport()
        admission = AdmissionControl(self.ledger, self.leads.ticket.token, (), OPEN, lambda: 0, Counter())
        self.admission = admission
        server = ElsewhereServer(
            self.ledger,
            self.blobs,
            admission,
            self.watchers,
            Meter(),
            status=lambda: {
                "seat": {
                    **{"peer_id": transport.peer_id, "role": "follows", "head": 3, "lag": 2},
                    "leader": self.watchers.who.now.leader,
                }
            },
            failed=lambda error: None,
            kept_from=lambda: 1,
            waits=Waits(),
            pushes=NoSeats(),
        )
        await self._serve(transport, server.handlers)
        return SeatEntry(peer_id=transport.peer_id, addresses=transport.addresses[:8])

    async def _serve(self, transport: P2PTransport, handlers: Mapping[str, StreamHandler]) -> None:
        reception = Reception()
        reception.hand_to(handlers)
        await reception.open_on(transport)

    async def transport(self) -> P2PTransport:
        transport = await start_p2p(new_key())
        self._stack.callback(lambda: self.call(transport.close()))
        self.daemons[transport.peer_id] = transport.daemon.pid
        return transport

    async def admit(self, peer_id: str) -> None:
        """The seat that does not lead hears of the peer, as from a commit."""
        self.ledger.admit(peer_id)

    async def _say(self, leader: str | None, waits_for: str = "", term: int = 0) -> None:
        for watchers in self.all_watchers:
            watchers.who.tell(leader, (self.follower, self.leader), waits_for, term)

    def say(self, leader: str | None, waits_for: str = "", term: int = 0) -> None:
        """What seats tell nodes from now on."""
        self.call(self._say(leader, waits_for, term))

    def call(self, work: Any) -> Any:
        """In the coordinator's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.leads.loop).result()

    async def _lead_as_another(self) -> SeatEntry:
        transport = await self.transport()
        await self._serve(transport, self.leads.server._stream_server.handlers)
        return SeatEntry(peer_id=transport.peer_id, addresses=transport.addresses[:8])

    def another_leader(self) -> SeatEntry:
        return self.call(self._lead_as_another())

    def wait_for_watch(self, link: HivemindLink) -> None:
        wait_until(
            lambda: any(link.peer_id in watchers for watchers in self.all_watchers),
            WAIT_S,
            lambda: "no watch session",
        )

    def link(self, name: str, ticket: Ticket | None = None, **options: Any) -> HivemindLink:
        link = HivemindLink(
            ticket or self.ticket, state=self.folder / name, host="127.0.0.1", patience_s=60, **options
        )
        self._stack.callback(link.close)
        return link


@pytest.fixture
def swarm(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> Iterator[Swarm]:
    with ExitStack() as stack:
        yield Swarm(tmp_path, make_genesis(min_peers=1), key, stack)


def _entry(ticket: Ticket) -> SeatEntry:
    return SeatEntry(peer_id=ticket.peer_id, addresses=ticket.addresses[:8])


def offer_of(payload: bytes, round_: int = 1) -> Offer:
    return Offer(
        round=round_,
        n_samples=1,
        n_tokens=1,
        loss=1.0,
        n_bytes=len(payload),
        payload=payload,
        digest=None,
    )


def train(link: HivemindLink, round_: int, payload: bytes = b"work") -> bytes:
    """One round of one peer; the digest of its record."""
    link.offer(offer_of(payload, round_))
    (commit,) = islice(link.commits(round_ - 1), 1)
    return commit.digest


def at(link: HivemindLink) -> str | None:
    """The seat of the link's session."""
    assert link._core is not None
    return link._core._coordinator._at


def waits_for_session_at(link: HivemindLink, seat: SeatEntry) -> None:
    wait_until(lambda: at(link) == seat.peer_id, WAIT_S, lambda: f"the session is at {at(link)}")


@pytest.mark.swarm
def test_a_node_goes_where_a_seat_leads_that_ticket_or_ledger_name(swarm: Swarm) -> None:
    other = swarm.another_leader()
    link = swarm.link("a", swarm.ticket.model_copy(update={"others": (swarm.leader, other)}))
    link.open()
    link.state(NodeState.TRAINING)
    assert at(link) == swarm.leader.peer_id, "the seat that was dialled first has said who leads"
    digests = [train(link, 1)]
    swarm.wait_for_watch(link)

    swarm.say(other.peer_id, term=1)  # as when the other one hangs, with its connections open
    waits_for_session_at(link, other)
    digests.append(train(link, 2))

    swarm.say(STRANGER, term=2)
    core = link._core
    assert core is not None
    wait_until(lambda: core._seats.n_lies > 0, WAIT_S, lambda: "the lie was not heard")
    digests.append(train(link, 3))
    assert at(link) == other.peer_id
    swarm.say(swarm.leader.peer_id, term=1)  # an old word: it is not gone back to
    digests.append(train(link, 4))
    assert at(link) == other.peer_id

    swarm.say(swarm.follower.peer_id, term=9)  # a seat by the ticket, but it does not lead
    digests.append(train(link, 5))
    wait_until(lambda: bool(core._coordinator._watch._misled), WAIT_S, lambda: "the node did not look")

    swarm.call(swarm.admit(link.peer_id))
    swarm.blobs.put(digest_of(BASE), BASE)  # the one that leads does not have it
    assert link.fetch(digest_of(BASE), len(BASE)) == BASE

    ledger = swarm.leads.call(lambda server: [commit.digest for commit in server.ledger.all_commits()])
    assert digests == ledger
    link.close()
    told = "\n".join(event.text for event in link.events())
    for text in (f"{swarm.leader.peer_id[-6:]} leads now", f"{other.peer_id[-6:]} leads now", "is no seat"):
        assert text in told, told
    assert swarm.leads.status()["rejected"] == {}
    assert not swarm.admission.rejected


@pytest.mark.swarm
def test_the_next_leader_gets_the_same_offer_to_the_last_bit(swarm: Swarm) -> None:
    service, heard = swarm.leads.server.service, list[bytes]()
    receive = service.receive

    def listen(peer_id: str, session: int, message: Message, now_s: float) -> None:
        if isinstance(message, Offer):
            heard.append(encode_message(message))
        receive(peer_id, session, message, now_s)

    service.receive = listen  # type: ignore[method-assign]
    other = swarm.another_leader()
    ticket = swarm.ticket.model_copy(update={"others": (swarm.leader, other)})
    link = swarm.link("a", ticket)
    link.open()
    link.state(NodeState.TRAINING)
    swarm.leads.call(lambda server: server.service.hold())  # the round stays open
    payload = bytes(range(256)) * 40  # it goes as a blob of its own
    link.offer(offer_of(payload))
    wait_until(lambda: len(heard) == 1, WAIT_S, str)
    swarm.say(other.peer_id, term=1)
    waits_for_session_at(link, other)
    wait_until(lambda: len(heard) == 2, WAIT_S, lambda: "the offer was not made to the next leader")
    swarm.leads.call(lambda server: server.service.go_on(time.monotonic()))
    (commit,) = islice(link.commits(0), 1)
    first, second = heard
    assert first == second, "with the signature that it had before"
    (entry,) = commit.body.offers
    assert entry.digest == digest_of(payload)
    work = swarm.leads.call(lambda server: server.ledger.work(commit.body.work))
    assert len(work) == 64
    assert work in first


@pytest.mark.swarm
def test_nothing_is_asked_of_a_leader_that_stands_still_once_another_leads(swarm: Swarm) -> None:
    """Streams to it do not break: nobody has said that they are over."""
    first, payload = swarm.another_leader(), bytes(range(256)) * 40
    swarm.say(first.peer_id, term=1)
    link = swarm.link("a", swarm.ticket.model_copy(update={"others": (swarm.leader, first)}))
    link.open()
    link.state(NodeState.TRAINING)
    waits_for_session_at(link, first)
    train(link, 1, payload)
    swarm.wait_for_watch(link)
    os.kill(swarm.daemons[first.peer_id], signal.SIGSTOP)
    try:
        swarm.say(swarm.leader.peer_id, term=2)
        waits_for_session_at(link, swarm.leader)
        link.offer(offer_of(payload[::-1], 2))
        service = swarm.leads.server.service
        wait_until(lambda: service.head == 2, STALL_S / 2, lambda: "the payload has not come to who leads")
    finally:
        os.kill(swarm.daemons[first.peer_id], signal.SIGCONT)


@pytest.mark.swarm
def test_an_old_ticket_leads_to_the_committee_that_the_ledger_names(swarm: Swarm) -> None:
    other = swarm.another_leader()
    entry = CommitteeEntry(seats=(swarm.leader, other), need=2)
    body = commit_body(1, parent=swarm.ledger.run_id, offers=(), committee=entry)
    swarm.ledger.append(body, swarm.key)
    swarm.say(other.peer_id, term=1)
    link = swarm.link("a", swarm.ticket.model_copy(update={"others": ()}))
    welcome = link.open()
    assert at(link) == other.peer_id, "named by a record, not by the ticket"
    assert welcome.head_round == 1, "a coordinator without the record got it back from this node"
    link.close()
    assert not swarm.admission.rejected
    again = ticket_in(swarm.folder / "a")
    assert [seat.peer_id for seat in again.seats] == [swarm.leader.peer_id, other.peer_id]
    assert (again.run_id, again.token) == (swarm.ticket.run_id, "")

    swarm.say(None, "a majority is gone")
    reader = swarm.link("r", swarm.ticket.model_copy(update={"others": ()}), about=About(agent=READER))
    assert reader.open().is_copy, "with nobody who leads the ledger can be read all the same"
    (commit,) = reader.records(0)
    assert commit.body.committee == entry


@pytest.mark.swarm
def test_readers_take_the_answer_of_who_leads_or_of_whoever_is_there(swarm: Swarm) -> None:
    lost = swarm.ticket.model_copy(update={"others": (_unreachable(B),)})
    with pytest.raises(ConfigError, match="token is wrong"):
        swarm.link("a", lost.model_copy(update={"token": "wrong"})).open()
    assert swarm.admission.rejected == {"token": 1}
    assert fetch_status(swarm.ticket)["state"] == "waiting", "the one that leads has answered"
    whose = seat_in_words(fetch_status(lost))
    assert whose is not None
    assert "follows, at round 3, 2 behind" in whose
    assert f"{swarm.leader.peer_id[-6:]} leads" in whose

    three = swarm.ticket.model_copy(update={"others": (swarm.leader, _unreachable(B))})
    found = list(check_network(NetworkPlan("127.0.0.1", 0, (), three), lambda: False))
    seats = {finding.name[-6:]: finding for finding in found if finding.name.startswith("coordinator ")}
    follower, leader, gone = (seats[s.peer_id[-6:]] for s in (swarm.follower, swarm.leader, _unreachable(B)))
    assert [follower.figures[name] for name in ("role", "head", "lag")] == ["follows", 3, 2]
    assert (leader.figures["role"], leader.status) == ("leads", "ok")
    assert (gone.status, "connection refused" in gone.detail) == ("warning", True)
    by_name = {finding.name: finding for finding in found}
    assert by_name["coordinators"].detail == "2 of 3 coordinators reachable from here"
    assert "opaque to the coordinator" in by_name["run"].detail, "who leads has answered"


def _unreachable(peer_id: str) -> SeatEntry:
    return SeatEntry(peer_id=peer_id, addresses=("/ip4/127.0.0.1/tcp/1",))


# --------------------------------------------------------------------------- who leads, without a network


Answer = Elsewhere | Exception | float | str
"""Of a seat: as it stands; for so many seconds nothing; or, in a word, that it leads."""


def known(leader: str = A) -> KnownSeats:
    a, *others = (_unreachable(peer_id) for peer_id in (A, B, C))
    seats = KnownSeats(
        Ticket(peer_id=A, addresses=a.addresses, run_id=digest_of(b""), token="t", others=tuple(others))
    )
    seats.leader = leader
    return seats


def elsewhere(leader: str | None, waits_for: str = "") -> Elsewhere:
    return Elsewhere(leader=leader, seats=(), waits_for=waits_for)


def search(
    seats: KnownSeats, answers: dict[str, Answer], announced: str = "", after: str = ""
) -> tuple[str, list[str]]:
    """Who is found, and whom this node has asked. `announced`: begins to lead when `after` is asked."""
    asked: list[str] = []
    told = asyncio.Event()
    stream = cast(Stream, None)
    welcome = Welcome.model_construct()

    async def approach(seat: str) -> tuple[Stream, Welcome | Elsewhere]:
        asked.append(seat)
        answer = answers[seat]
        if seat == after and seat not in asked[:-1]:
            seats.leader = announced
            answers[announced] = "leads"
            told.set()
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            raise SwarmUnreachable("no answer")
        if isinstance(answer, Exception):
            raise answer
        return stream, answer if isinstance(answer, Elsewhere) else welcome

    found = asyncio.run(find_leader(seats, approach, told))
    return found.seat, asked


def test_who_is_said_to_lead_is_asked_next() -> None:
    assert search(known(), {A: elsewhere(C), C: "leads"}) == (C, [A, C])
    gone = SwarmUnreachable("connection refused")
    assert search(known(C), {C: gone, A: elsewhere(C), B: "leads"}) == (B, [C, A, B])


def test_a_seat_that_says_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "HEAD_START_S", 0.01)
    assert search(known(), {A: 60.0, B: elsewhere(A), C: "leads"}) == (C, [A, B, C])


def test_who_begins_to_lead_meanwhile_is_asked_at_once_and_never_twice_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finding, "HEAD_START_S", 0.01)
    nobody = elsewhere(None)
    assert search(known(), {A: 60.0, B: nobody, C: nobody}, announced=B, after=C) == (B, [A, B, C, B])
    assert search(known(), {A: 60.0, B: nobody, C: nobody}, announced=B, after=B) == (B, [A, B, B])
    assert search(known(), {A: 60.0, B: nobody, C: 60.0}, announced=C, after=B) == (C, [A, B, C])


def test_nobody_goes_to_a_stranger_and_the_lie_is_counted() -> None:
    seats = known()
    lie = Elsewhere(leader=STRANGER, seats=(_unreachable(STRANGER),), waits_for="")
    with pytest.raises(NobodyLeads):
        search(seats, dict.fromkeys((A, B, C), lie))
    assert (seats.n_lies, STRANGER in seats, seats.addresses(STRANGER)) == (3, False, ())


def test_people_are_told_what_training_waits_for() -> None:
    gone = SwarmUnreachable("cannot reach it:\n  /ip4/1.2.3.4/tcp/1: connection refused")
    waits = "one more of B and C"
    with pytest.raises(NobodyLeads, match=rf"^no coordinator leads: {waits}$"):
        search(known(), {A: elsewhere(None, waits), B: gone, C: gone})
    with pytest.raises(NobodyLeads, match=r"2 of 3 .* which led, does not answer \(.*connection refused\)$"):
        search(known(), {A: gone, B: elsewhere(A), C: elsewhere(A)})
    with pytest.raises(SwarmUnreachable, match="none of 3 coordinators is reachable"):
        search(known(), dict.fromkeys((A, B, C), gone))


def test_what_the_leader_refuses_is_final_and_what_another_refuses_is_not() -> None:
    banned = ConfigError("banned")
    with pytest.raises(ConfigError, match="banned"):
        search(known(), {A: elsewhere(B), B: banned, C: elsewhere(B)})
    assert search(known(), {A: banned, B: elsewhere(C), C: "leads"})[0] == C
    with pytest.raises(ConfigError, match="banned"):
        search(known(), {A: banned, B: SwarmUnreachable("gone"), C: banned})


def test_a_sealed_record_names_seats_and_their_addresses() -> None:
    seats = known()
    seats.name((_unreachable(STRANGER), SeatEntry(peer_id=C, addresses=("/ip4/127.0.0.1/tcp/2",))))
    assert seats.in_order() == [A, STRANGER, C, B], "who led, the committee, and what else the ticket has"
    assert seats.heard(elsewhere(STRANGER)) == STRANGER
    assert seats.addresses(C) == ("/ip4/127.0.0.1/tcp/2", "/ip4/127.0.0.1/tcp/1")
