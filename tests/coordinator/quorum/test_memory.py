"""What a leader tells its successor: deadlines, losses and figures go on; lies cost figures only."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.service_world import MakeWorld, World
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.policy import KEPT_ROUNDS
from thinwire.coordinator.protocol.messages import (
    MAX_PEERS,
    BadMessage,
    Evaluation,
    Figure,
    Heartbeat,
    Report,
)
from thinwire.coordinator.quorum.memory import MAX_MEMORY_BYTES, MAX_TIMES, Memory
from thinwire.coordinator.quorum.recollection import Recollection

RUN = bytes(32)


def works(world: World, first: int, last: int, *peers: str) -> None:
    for round_ in range(first, last + 1):
        world.now_s += 2.0
        world.wall_ms += 2000
        world.round(round_, *peers)


def successor(world: World) -> Recollection:
    """Of a seat that has the ledger, and its own of what is not in it."""
    folder = world.path / "follower"
    if not folder.exists():
        folder.mkdir()
        Ledger.begin(
            folder / "ledger.db", world.ledger.genesis_record, world.ledger.genesis_signature
        ).close()
    ledger = Ledger.open(folder / "ledger.db", world.key.public_key())
    for sealed in world.ledger.sealed(ledger.head_round, 1000):
        ledger.take(sealed)
    return Recollection(ledger, BlobStore(folder / "blobs"))


def led(world: World) -> World:
    world.train("a", "b", "c")
    for peer in "abc":
        world.say(peer, Heartbeat(round=0, sent_bytes=100, received_bytes=200, payload_bytes=50))
    works(world, 1, 4, "a", "b", "c")
    works(world, 5, 5, "a", "b")  # c is awaited
    world.wait(30.0, "a", "b", "c")
    assert world.ledger.head_round == 5
    world.say("a", Report(round=2, held_out=0.25))
    world.say("a", Evaluation(round=4, figures=(Figure(name="accuracy", value=0.5),)))
    return world


def test_a_successor_goes_on_where_the_leader_was(make_world: MakeWorld) -> None:
    world = led(make_world(policy="deadline", eval_every=2, rounds=50, evaluation={"every": 2}))
    before = world.status()
    seat = successor(world)
    seat.remember(world.service.memory())
    world.ledger.close()
    world.ledger = seat._ledger
    assert [loss for _, loss in world.ledger.held_out()] == [0.25]
    assert world.ledger.evaluations(9) == [(4, {"accuracy": 0.5})]
    world.sessions.clear()
    world.start(recollection=seat)
    after = world.status()
    for key in ("round_s", "timed_rounds", "timed_rounds_s", "held_out", "evaluations", "loss"):
        assert after[key] == before[key], key
    for peer in ("a", "b", "c"):
        known = next(p for p in before["peers"] if p["peer_id"] == peer)
        assert world.peer(peer)["sent_bytes"] == known["sent_bytes"] == 110
        assert world.peer(peer)["offers_missed"] == known["offers_missed"]
    world.train("a", "b")
    works(world, 6, 6, "a")
    world.wait(4.0, "a", "b")  # after three rounds of 2 s there is a deadline
    assert world.ledger.head_round == 6
    assert [o.peer for o in world.ledger.commits(5, 1)[0].body.offers] == [0]


def test_without_it_there_is_no_deadline(make_world: MakeWorld) -> None:
    world = led(make_world(policy="deadline", eval_every=2, rounds=50, evaluation={"every": 2}))
    world.restart()
    world.sessions.clear()
    world.train("a", "b")
    works(world, 6, 6, "a")
    world.wait(4.0, "a", "b")
    assert world.ledger.head_round == 5


def test_what_is_told_again_changes_nothing(make_world: MakeWorld) -> None:
    """A seat leads, follows, and leads again."""
    world = led(make_world(policy="deadline", eval_every=2, rounds=50))
    seat = world.service._recollection
    before, trend, memory = world.status(), world.service.trend(0), world.service.memory()
    for _ in range(2):
        seat.reign_ended(memory)
        seat.remember(memory)
        world.start(recollection=seat)
        after = world.status()
        for key in ("round_s", "timed_rounds", "timed_rounds_s", "held_out", "changes"):
            assert after[key] == before[key], key
        shown = world.service.trend(0)
        assert {k: v for k, v in shown.items() if k != "stamp"} == {
            k: v for k, v in trend.items() if k != "stamp"
        }
        assert json.loads(world.service.memory()) == json.loads(memory)


def test_time_never_runs_backwards(make_world: MakeWorld) -> None:
    """The clock of the successor is behind."""
    world = make_world()
    world.train("a", "b")
    world.wall_ms = 5000
    world.round(1, "a", "b")
    world.wall_ms = 77
    world.round(2, "a", "b")
    assert [c.body.time_ms for c in world.ledger.all_commits()] == [5000, 5000]


LIES: list[Any] = [
    b"nothing",
    b"[" * 100_000,
    b"{}",
    b" " * (MAX_MEMORY_BYTES + 1),
    {"head": -1},
    {"run_id": "00"},
    {"times": [[1, 0, float("inf"), 1, "come"]]},
    {"times": [[1, 0, 1.0, 1, "gone"]]},
    {"times": [[1, 2**16, 1.0, 1, "come"]]},
    {"times": [[1, 0, 1.0, 1, "come"]] * (MAX_TIMES + 1)},
    {"held_out": [[1, None]]},
    {"evaluations": [[1, {"\n": 1.0}]]},
    {"unkept": [[0, 0]]},
    {"durations_s": [1.0] * 99},
]


@pytest.mark.parametrize("lie", LIES, ids=range(len(LIES)))
def test_what_is_no_memory_is_refused(lie: Any) -> None:
    if isinstance(lie, dict):
        lie = json.dumps({"format": 1, "run_id": RUN.hex(), "head": 3, **lie}).encode()
    with pytest.raises(BadMessage):
        Memory.parse(lie, RUN)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), st.lists, max_leaves=10))
def test_any_json_is_a_memory_or_refused(value: Any) -> None:
    for key in ("times", "held_out", "timed", "history"):
        data = json.dumps({"format": 1, "run_id": RUN.hex(), "head": 3, key: value}).encode()
        try:
            Memory.parse(data, RUN).offer_times(3)
        except BadMessage:
            continue


def test_a_lie_spoils_figures_and_nothing_else(make_world: MakeWorld) -> None:
    world = led(make_world(policy="deadline", eval_every=2, rounds=50))
    seat = successor(world)
    told = json.loads(world.service.memory())
    told["times"] = [[r, p, 0.001, 1, "come"] for r in range(900, 900 + KEPT_ROUNDS) for p in range(3)]
    told["held_out"] = [[1, 9.0], [2, 9.0], [900, 9.0]]
    told["history"] = "{"
    told["head"] = 2**32 - 1
    seat.remember(json.dumps(told).encode())
    assert seat._ledger.held_out() == [(2, 9.0)], "of rounds that somebody evaluates, up to the head"
    world.start(recollection=seat)
    assert world.service._parts.rounds.times.rounds(before=10_000) == []
    seat._ledger.close()


def test_the_largest_memory_fits() -> None:
    times = tuple((r, p, 1.2345678901234567, 1000, "come") for r in range(1, 9) for p in range(MAX_PEERS))
    memory = Memory(run_id=RUN.hex(), head=9, times=times, history='"' * 900_000)
    packed = memory.packed()
    assert len(packed) <= MAX_MEMORY_BYTES
    again = Memory.parse(packed, RUN)
    assert (again.times, again.history) == (times, "")
