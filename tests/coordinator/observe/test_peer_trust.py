"""What people see of each peer: sizes that half of the nodes agree on, refusals, empty offers."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support.service_world import World, offer
from thinwire.coordinator.observe.peer_sizes import MAX_NODES, STALE_S, PeerSizes
from thinwire.coordinator.observe.refusals import KEPT_PEERS, Refusals
from thinwire.coordinator.protocol.messages import (
    MAX_SIZES,
    BadMessage,
    GenesisBody,
    Heartbeat,
    Offer,
    PeerSize,
    Rejected,
    decode_message,
    encode_message,
)
from thinwire.node.cli.view import swarm_table


def beat(*sizes: tuple[int, int, int], round_: int = 1) -> Heartbeat:
    told = tuple(PeerSize(peer=peer, size=size, clipped=clipped) for peer, size, clipped in sizes)
    return Heartbeat(round=round_, sent_bytes=1, received_bytes=1, payload_bytes=1, sizes=told)


# -------------------------------------------------------------------------------------------------- sizes


def test_one_liar_of_four_changes_nothing_that_is_shown() -> None:
    sizes = PeerSizes(lambda peer: peer < 4, lambda peer: peer < 4)
    for node, said in enumerate([(100, 0), (100, 0), (100, 0), (10**8, 100)]):
        sizes.heard(node, [PeerSize(peer=0, size=said[0], clipped=said[1])], 10.0)
    for node, said in enumerate([(90_000, 100), (90_000, 100), (90_000, 100), (100, 0)]):
        sizes.heard(node, [PeerSize(peer=3, size=said[0], clipped=said[1])], 10.0)
    assert sizes.of(0, 11.0) == (1.0, 0.0, 4)
    assert sizes.of(3, 11.0) == (900.0, 1.0, 4)
    assert sizes.of(1, 11.0) is None
    assert sizes.of(3, 11.0 + STALE_S) is None


def test_one_node_alone_and_those_without_work_are_not_listened_to() -> None:
    worked = {0}
    sizes = PeerSizes(worked.__contains__, lambda peer: peer < 2)
    for node in range(5):
        sizes.heard(node, [PeerSize(peer=1, size=300, clipped=50)], 0.0)
    assert sizes.of(1, 1.0) is None
    worked.add(1)
    sizes.heard(1, [PeerSize(peer=1, size=100, clipped=0), PeerSize(peer=7, size=100, clipped=0)], 0.0)
    assert sizes.of(1, 1.0) == (1.0, 0.0, 2)  # of two the kinder one
    sizes.heard(0, [PeerSize(peer=7, size=100, clipped=0)], 0.0)
    assert sizes.of(7, 1.0) is None  # nobody knows a peer 7
    worked.remove(1)
    assert sizes.of(1, 1.0) is None  # condemned: its word is none any more


def test_the_newest_words_of_a_bounded_number_of_nodes_are_kept() -> None:
    sizes = PeerSizes(lambda _: True, lambda _: True)
    for node in range(1000):
        sizes.heard(node, [PeerSize(peer=0, size=node, clipped=0)], float(node) / 1000)
    assert sizes.of(0, 2.0) == ((1000 - 1 - MAX_NODES // 2) / 100, 0.0, MAX_NODES)


def test_a_heartbeat_without_sizes_has_the_bytes_that_it_always_had() -> None:
    assert encode_message(beat()) == bytes.fromhex("960a01010101c0")
    assert decode_message(bytes.fromhex("960a01010101c0")) == beat()
    told = beat((0, 100, 0), (3, 10**8, 100))
    assert decode_message(encode_message(told)) == told
    assert len(encode_message(beat(*((i, 104, 0) for i in range(MAX_SIZES))))) < 50
    many = beat().model_copy(update={"sizes": beat((0, 1, 1)).sizes * (MAX_SIZES + 1)})
    with pytest.raises(BadMessage):
        decode_message(encode_message(many))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5), st.integers(0, 10**8), st.integers(0, 100))))
def test_whatever_nodes_say_a_majority_bounds_it(said: list[tuple[int, int, int, int]]) -> None:
    sizes = PeerSizes(lambda _: True, lambda peer: peer < 3)
    last: dict[int, dict[int, int]] = {}
    for node, peer, size, clipped in said:
        sizes.heard(node, [PeerSize(peer=peer, size=size, clipped=clipped)], 0.0)
        last.setdefault(peer, {})[node] = size
    for peer, told in last.items():
        found = sizes.of(peer, 0.0)
        if peer >= 3 or len(told) < 2:
            assert found is None
        elif len(told) <= MAX_NODES:
            assert found is not None
            assert 2 * sum(size <= 100 * found.size + 0.5 for size in told.values()) >= len(told)


# ----------------------------------------------------------------------------------------------- refusals


def test_refusals_are_counted_by_who_brought_them_and_bounded() -> None:
    rejected = Counter[Rejected]({"token": 7})
    refusals = Refusals(rejected)
    with refusals.of(1):
        rejected["samples"] += 2

    def refuse() -> None:
        with refusals.of(1):
            rejected["samples"] += 1
            raise ValueError("on its way")

    with pytest.raises(ValueError, match="on its way"):
        refuse()
    with refusals.of(None):
        rejected["token"] += 1
    assert refusals.by(1) == {"samples": 3}
    assert refusals.by(2) == {}
    for peer in range(2, KEPT_PEERS + 2):
        with refusals.of(peer):
            rejected["late_offer"] += 1
    assert refusals.by(1) == {}
    assert refusals.by(KEPT_PEERS + 1) == {"late_offer": 1}


# ------------------------------------------------------------------------------------- the coordinator's view


@pytest.fixture
def world(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> Iterator[World]:
    world = World(tmp_path, make_genesis(rounds=1000), key)
    yield world
    world.ledger.close()


def empty(round_: int) -> Offer:
    return offer(round_, b"", n_samples=0, n_tokens=0, loss=None)


def test_a_status_tells_of_each_peer(world: World) -> None:
    world.train("a", "b", "c")
    world.round(1, "c", "a", "b")
    nothing = {"size": None, "clipped": None, "rejected": {}, "condemned_until": None, "offers_empty": 0}
    assert nothing.items() <= world.peer("a").items()
    for name in ("a", "b", "c"):
        world.say(name, beat((0, 100, 0), (2, 90_000, 100)))
    assert (world.peer("a")["size"], world.peer("c")["size"], world.peer("b")["size"]) == (1.0, 900.0, None)
    assert world.peer("c")["clipped"] == 1.0

    world.say("b", offer(500))
    with pytest.raises(BadMessage):
        world.say("c", offer(2, n_samples=2**20))
    assert world.peer("b")["rejected"] == {"wrong_round": 1}
    assert world.peer("c")["rejected"] == {"samples": 1}
    assert world.peer("a")["rejected"] == {}
    world.service.count_rejected("too_slow", "a")
    world.service.count_rejected("frame_cut")
    assert world.peer("a")["rejected"] == {"too_slow": 1}

    for round_ in (2, 3):
        world.say("a", offer(round_, b"a"))
        world.say("b", offer(round_, b"b"))
        world.say("c", empty(round_))
    assert [world.peer(name)["offers_empty"] for name in "abc"] == [0, 0, 2]
    assert [world.peer(name)["offers_counted"] for name in "abc"] == [3, 3, 1]

    peers = world.service.overview(world.now_s)["peers"]
    assert peers[0]["trust"] == {"size": 1.0, "rejected": {"too_slow": 1}}
    assert peers[2]["trust"] == {"size": 900.0, "clipped": 1.0, "rejected": {"samples": 1}}
    assert peers[2]["empty"] == 2

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(swarm_table(world.status()))
    text = console.export_text()
    assert "900.0x (100% clipped)" in text
    assert "is far from the others: its payloads are 900.0 times the median" in text
    assert "dropped every batch of 2 of its offers" in text
    assert text.count("is far from") == 1


def test_a_restart_keeps_what_the_ledger_tells(world: World) -> None:
    world.train("a", "b")
    world.say("a", offer(1))
    world.say("b", empty(1))
    for name in ("a", "b"):
        world.say(name, beat((0, 100, 0)))
    assert world.peer("b")["offers_empty"] == 1
    assert world.peer("a")["size"] is None  # the other one has no counted work
    world.restart()
    assert world.peer("b")["offers_empty"] == 1
    assert json.dumps(world.status())


def test_evaluations_are_on_the_page(world: World) -> None:
    for round_ in range(1, 20):
        world.ledger.note_evaluation(round_, {"accuracy": round_ / 100, "n": 3.0})
    found = world.service.overview(world.now_s)["evaluations"]
    assert [round_ for round_, _ in found] == list(range(19, 11, -1))
    assert "accuracy 0.19" in found[0][1]


def test_a_status_has_a_bounded_number_of_held_out_losses(world: World) -> None:
    for round_ in range(1000):
        world.ledger.note_held_out(round_, 5.0)
    found = [round_ for round_, _ in world.status()["held_out"]]
    assert (len(found), found[0], found[-1]) == (500, 0, 999)
