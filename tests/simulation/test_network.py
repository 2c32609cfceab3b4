"""Volunteers in modelled time, with the real `Rounds` and the real `Fanout`: no copy of a payload is lost,
whoever leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from thinwire.coordinator.rounds import Action, OfferMade, RoundEvent, Rounds
from thinwire.coordinator.serving.fanout import Fanout
from thinwire.node.bench.network.copies import OWN as MADE
from thinwire.node.bench.network.copies import Free, Lines, give
from thinwire.node.bench.network.lines import KINDS, MBIT
from thinwire.node.bench.network.swarm import Swarm, simulate

N, N_BYTES, OWN = 40, 1_000_000, 50 * MBIT
COPIES = N * (N - 1)


@pytest.fixture
def swarm() -> Swarm:
    """After rounds of which lines are known; nobody leaves."""
    made = Swarm(N, N_BYTES, "dealt", OWN, KINDS, compute_s=10.0, seed=3)
    for peer in made.peers:
        peer.until_s = math.inf
    made.run(5, warm_up=0)
    return made


def test_everybody_gets_every_payload_once_from_whom_was_named(swarm: Swarm) -> None:
    swarm.run(3, warm_up=0)
    tally = swarm.tally
    assert tally.counted == [1.0] * 3
    assert tally.copies == [COPIES] * 3
    assert tally.again == [0.0] * 3
    assert min(tally.most_sent) > 2 * N * N_BYTES, "somebody passes on what others have made"


def test_a_parent_that_leaves_half_way_costs_no_round_and_no_offer(swarm: Swarm) -> None:
    """What it has not passed on comes from the coordinator; its own payload, which is there, counts."""
    parent = max((p for p in swarm.peers if p.machine.is_reachable), key=lambda p: p.machine.up)
    parent.until_s = parent.ready_s + 2.5 * parent.machine.compute_s
    swarm.run(1, warm_up=0)
    assert swarm.tally.counted == [1.0]
    assert swarm.tally.copies == [COPIES]
    assert 0 < swarm.tally.again[0] < COPIES / 5
    assert swarm.tally.by_coordinator[0] > swarm.tally.again[0] * N_BYTES
    assert parent not in swarm.peers
    swarm.run(2, warm_up=0)
    assert swarm.tally.counted == [1.0] * 2
    assert swarm.tally.copies == [COPIES] * 2


def test_who_still_fetches_when_a_round_closes_offers_nothing_for_it(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works again when it is at the newest commit, and its offer counts."""
    offered: list[tuple[int, int]] = []
    handle = Rounds.handle

    def heard(self: Rounds, event: RoundEvent, now_s: float) -> list[Action]:
        if isinstance(event, OfferMade):
            offered.append((event.peer, event.round))
        return handle(self, event, now_s)

    monkeypatch.setattr(Rounds, "handle", heard)
    swarm.peers[0].ready_s += 600.0
    n_rounds = 0
    while n_rounds == 0 or swarm.tally.counted[-1] < 1.0:
        swarm.run(1, warm_up=0)
        n_rounds += 1
        assert n_rounds < 100
    rounds = [round_ for peer, round_ in offered if peer == 0]
    assert 0 < len(rounds) < n_rounds / 2


def test_copies_wait_for_those_of_the_round_before() -> None:
    """Of a line that has still something to send, and of one on which something still comes."""
    n, wide = 3, np.full(3, 1e6)

    def done_s(free: Free) -> float:
        lines = Lines(wide, wide, np.zeros(n), np.full(n, math.inf), own=1e6, free=free)
        named = np.array([[n + MADE, 0, 0]])
        return float(give(named, [0], np.array([10.0]), 10.0, 1_000_000, 1.0, lines).done_N.max())

    idle = Free(np.zeros(n + 1), np.zeros(n))
    assert done_s(idle) == 12.0, "two copies, one after the other"
    assert done_s(replace(idle, up_H=np.full(n + 1, 15.0))) == 17.0
    assert done_s(replace(idle, down_N=np.full(n, 15.0))) == 16.0


def without_one(sources: dict[str, str | None], origin: str) -> None:
    sources.popitem()


def from_who_has_it_from_another_relay(sources: dict[str, str | None], origin: str) -> None:
    relay, other = sorted(peer for peer in {*sources.values()} if peer not in (None, origin))[:2]
    sources[relay], sources[other] = other, relay


@pytest.mark.parametrize("bug", [without_one, from_who_has_it_from_another_relay])
def test_a_copy_that_nobody_gives_is_found(
    swarm: Swarm, bug: Callable[[dict[str, str | None], str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = Fanout.sources
    n_broken = 0

    def broken(self: Fanout, n_bytes: int, origin: str, *args: list[str]) -> dict[str, str | None]:
        nonlocal n_broken
        found = sources(self, n_bytes, origin, *args)
        if len({*found.values()} - {None, origin}) > 1:
            bug(found, origin)
            n_broken += 1
        return found

    monkeypatch.setattr(Fanout, "sources", broken)
    swarm.run(1, warm_up=0)
    assert n_broken > 0
    assert swarm.tally.again[0] >= n_broken
    assert swarm.tally.copies == [COPIES]


def test_a_seed_gives_the_same_rounds_again() -> None:
    def figures(seed: int) -> dict[str, float]:
        found = simulate(N, N_BYTES, "dealt", OWN, KINDS, n_rounds=3, seed=seed)
        del found["coordinator_cpu_s"]
        return found

    assert figures(1) == figures(1) != figures(2)
