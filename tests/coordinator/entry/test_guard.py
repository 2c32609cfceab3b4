"""Bans and tokens that change while a coordinator serves, and in the folder of one that does not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.service_world import MakeWorld, offer
from tests.support.waiting import wait_until
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.control.orders import Order, no_strategy
from thinwire.coordinator.control.owner import give_order, write_order
from thinwire.coordinator.control.wire import Answer
from thinwire.coordinator.entry.rules import OPEN, EntryRules
from thinwire.coordinator.entry.tickets import invite, ticket_with
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import new_key, peer_id_of, save
from thinwire.coordinator.protocol.messages import (
    BadMessage,
    GenesisBody,
    NodeState,
    decode_record,
    encode_record,
)
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.state import StateDir
from thinwire.node.cli.status import fetch_status
from thinwire.node.links.hivemind import HivemindLink

PEER = peer_id_of(new_key().public_key())


def folder_of(tmp_path: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    save(key, folder / "key")
    Ledger.create(folder / "ledger.db", genesis, key).close()
    return folder


def give(folder: Path, what: str, *peers: str) -> Answer:
    order = Order.model_validate({"what": what, "peers": peers})
    return give_order(folder, order, no_strategy, lambda _answer: None, lambda: False)


def test_an_order_of_before_there_were_bans_is_read() -> None:
    assert decode_record(Order, encode_record(Order(what="stop"))) == Order(what="stop")
    assert encode_record(Order(what="stop")) == b"\x93\xa4stop\x00\x90"
    with pytest.raises(BadMessage):
        decode_record(Order, encode_record(Order(what="ban", peers=(PEER,)))[:-1])


# --------------------------------------------------------------------------------- without a coordinator


def test_bans_and_tokens_of_a_coordinator_that_does_not_run(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> None:
    folder = folder_of(tmp_path, make_genesis(), key)
    with StateDir(folder) as state:
        token = state.token()
    answer = give(folder, "ban", PEER)
    assert (answer.what, answer.round, answer.told) == (
        "done",
        0,
        (f"{PEER} is banned: it is not let in any more",),
    )
    give(folder, "rotate-token")
    with StateDir(folder) as state:
        assert (state.banned(), state.token() != token) == ({PEER}, True)
        with pytest.raises(ConfigError, match="in use"):
            write_order(folder, Order(what="unban", peers=(PEER,)), no_strategy)
    give(folder, "unban", PEER)
    told = give(folder, "listed", PEER).told
    assert told == ("from now on comes in: 1 listed peer, and nobody else; sessions go on",)
    with StateDir(folder) as state:
        assert (state.banned(), state.rules()) == (frozenset(), EntryRules.of("listed", [PEER]))


@pytest.mark.parametrize(
    ("what", "peers", "text"),
    [
        ("ban", (), "ban whom"),
        ("unban", (), "unban whom"),
        ("ban", ("lab-7",), "is not the peer id"),
        ("unban", ("lab-7",), "lab-7 is not banned"),
        ("listed", (), "listed takes the peer ids"),
        ("listed", ("lab-7",), "is not the peer id"),
        ("open", (PEER,), "open and invited take none"),
    ],
)
def test_what_is_no_peer_is_refused(
    tmp_path: Path,
    make_genesis: Callable[..., GenesisBody],
    key: Ed25519PrivateKey,
    what: str,
    peers: tuple[str, ...],
    text: str,
) -> None:
    folder = folder_of(tmp_path, make_genesis(), key)
    with pytest.raises(ConfigError, match=text):
        give(folder, what, *peers)
    with StateDir(folder) as state:
        assert (state.banned(), state.rules()) == (frozenset(), OPEN)


# ------------------------------------------------------------------------------------------- while it runs


def test_nobody_waits_for_a_peer_that_is_banned(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.say("a", offer(1))
    assert world.service.head == 0
    world.service.guard(frozenset("b"), "another", ["b is banned"], world.now_s)
    world.service.tick(world.now_s)
    assert (world.service.head, world.peer("b")["state"]) == (1, "gone")
    assert world.ended == [("b", "this peer was banned from the run: ask whoever runs the coordinator")]
    assert "b is banned" in world.status()["changes"][-1]
    with pytest.raises(ConfigError, match="banned"):
        world.open("b")
    with pytest.raises(ConfigError, match="token is wrong"):
        world.open("c")
    world.open("c", token="another")
    world.service.guard(frozenset(), "another", ["b may come in again"], world.now_s)
    world.open("b")
    assert world.status()["rejected"] == {"banned": 1, "token": 1}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.swarm
@pytest.mark.usefixtures("own_temp_folder")
def test_a_ban_ends_a_session_at_once_and_a_new_token_shuts_out_newcomers(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey, stack: ExitStack
) -> None:
    folder = folder_of(tmp_path, make_genesis(min_peers=1), key)
    coordinator = stack.enter_context(ServerThread(folder))

    def link(name: str, ticket: Ticket, **options: Any) -> HivemindLink:
        found = HivemindLink(ticket, state=tmp_path / name, host="127.0.0.1", **options)
        stack.callback(found.close)
        return found

    first, bad = link("first", coordinator.ticket), link("bad", coordinator.ticket)
    for one in (first, bad):
        one.open()
        one.state(NodeState.TRAINING)
    told = give(folder, "ban", bad.peer_id).told
    assert told == (f"{bad.peer_id} is banned: it is not let in any more",)
    with pytest.raises(ConfigError, match="this peer was banned"):
        list(islice(bad.commits(0), 1))
    with pytest.raises(ConfigError, match="this peer was banned"):
        link("bad", coordinator.ticket).open()
    wait_until(lambda: first.peer_id in _training(coordinator), 20, str)
    assert bad.peer_id not in _training(coordinator)

    invited = invite(folder, "lab-7", 1, 0)
    tickets = list[str]()
    coordinator.server.on_new_ticket = lambda: tickets.append(coordinator.server.ticket.line())
    old = coordinator.ticket
    give(folder, "rotate-token")
    new = ticket_with(folder, (folder / "token").read_text())
    assert (tickets, new.token != old.token) == ([new.line()], True)
    with pytest.raises(ConfigError, match="token is wrong"):
        link("second", old).open()
    with pytest.raises(ConfigError, match="token is wrong"):
        fetch_status(old)
    link("second", new).open()
    link("third", invited).open()
    with pytest.raises(ConfigError, match="invitation lab-7 lets in 1 identity, which has"):
        link("fourth", invited).open()
    assert fetch_status(invited)["rejected"] == {"banned": 1, "token": 2, "uninvited": 1}
    give(folder, "unban", bad.peer_id)
    link("bad", new).open()
    give(folder, "invited")
    with pytest.raises(ConfigError, match="takes invited peers only"):
        link("fifth", new).open()
    give(folder, "open")
    link("fifth", new).open()
    assert first.peer_id in _training(coordinator), "nothing of this ends a session"


def _training(coordinator: ServerThread) -> set[str]:
    return {peer["peer_id"] for peer in coordinator.status()["peers"] if peer["state"] == "training"}
