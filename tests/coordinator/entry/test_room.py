"""Known peers find room among strangers, and strangers among one another what is left."""

from __future__ import annotations

import pytest

from tests.support.service_world import MakeWorld, World
from thinwire.compression.errors import ConfigError, Incompatible
from thinwire.coordinator.entry import gate
from thinwire.coordinator.entry.rates import Rate
from thinwire.coordinator.protocol.trust.invitation import Invitation


def full(make_world: MakeWorld) -> World:
    """A run of three places: "a" and "b" have worked, "b" has gone since, and two strangers came."""
    world = make_world(max_peers=3)
    world.train("a", "b")
    world.round(1, "a", "b")
    world.service.closed("b", 1, world.now_s)
    world.wait(3, "a")
    world.train("x", "y")
    assert world.ended == []
    return world


def test_a_peer_that_has_worked_takes_the_place_of_the_newest_stranger(make_world: MakeWorld) -> None:
    world = full(make_world)
    with pytest.raises(Incompatible, match="full: 3 of 3"):
        world.open("z")
    world.train("b")
    assert world.ended == [
        ("y", "the swarm is full, and a peer whose work has counted came back: try again later")
    ]
    assert [world.peer(name)["state"] for name in ("a", "b", "x")] == ["training", "training", "training"]
    assert world.status()["rejected"] == {"full": 2}
    world.round(2, "a", "b", "x")
    assert world.service.head == 2, "nobody waits for the one that had to go"
    world.service.closed("y", 1, world.now_s)
    world.wait(3, "a", "b", "x")
    with pytest.raises(Incompatible, match="full: 3 of 3"):
        world.open("y")


def test_two_that_come_back_take_two_places(make_world: MakeWorld) -> None:
    world = make_world(max_peers=3, min_peers=3)
    world.train("a", "b", "c")
    world.round(1, "a", "b", "c")
    for peer in ("b", "c"):
        world.service.closed(peer, 1, world.now_s)
    world.wait(3, "a")
    world.train("x", "y")
    world.train("b", "c")
    assert [peer for peer, _ in world.ended] == ["y", "x"]


def test_among_peers_that_have_worked_a_full_swarm_is_full(make_world: MakeWorld) -> None:
    world = full(make_world)
    world.round(2, "x", "y", "a")
    assert world.service.head == 2
    with pytest.raises(Incompatible, match="full: 3 of 3"):
        world.open("b")
    assert world.ended == []


def test_a_banned_peer_takes_nobody_s_place(make_world: MakeWorld) -> None:
    world = full(make_world)
    world.service.guard(frozenset("b"), "secret", [], world.now_s)
    with pytest.raises(ConfigError, match="banned"):
        world.open("b")
    assert [peer for peer, _ in world.ended] == ["b"]


def test_a_ticket_that_leaks_does_not_use_up_the_places_of_the_ledger(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "NEWCOMERS", Rate(0.5, 3.0))
    world = make_world()
    world.open("0", "1", "2")
    with pytest.raises(ConfigError, match="too many new identities"):
        world.open("3")
    world.open("0")
    token = Invitation.make(world.key, world.ledger.run_id, "lab-7", 1, 0, bytes(8)).text()
    world.open("invited", token=token)
    world.wall_ms += 2000
    world.open("3")
    assert world.status()["rejected"] == {"rate": 1}
