"""Real processes, killed: some of a crowd in the middle of a round, or everything at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import pytest

from tests.chaos.harness import Swarm
from tests.chaos.program import Node

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

BLOBS = {"strategy.compressor.name": "dct_topk", "strategy.compressor.k": 512}
"""Payloads of 7.5 kB, which go from node to node."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Five nodes; every test leaves them training."""
    with Swarm(tmp_path_factory.mktemp("crowd"), 5, settings=BLOBS, work_s=0.2) as swarm:
        yield swarm


def kill_in_a_round(swarm: Swarm, nodes: list[Node]) -> None:
    """At a moment that the swarm's seed chooses."""
    swarm.wait_rounds(1)
    time.sleep(swarm.rng.random() * 0.2)
    for node in nodes:
        node.kill()


def test_two_of_five_killed_in_a_round_stall_nobody_and_come_back(crowd: Swarm) -> None:
    crowd.wait_rounds(10)
    median_s = median(crowd.book.durations_s(crowd.head() - 10))
    dead = crowd.rng.sample(crowd.nodes, 2)
    living = [node for node in crowd.nodes if node not in dead]
    kill_in_a_round(crowd, dead)
    killed_at = crowd.head()
    crowd.wait(
        lambda: crowd.head() > killed_at,
        max(2 * median_s, 10),
        "the round in which two of five were killed",
    )

    agreed = crowd.wait_agreed(living)
    assert agreed > killed_at
    # An offer of a dead peer counted for all or for none: what decides is the commit, and all have the same.
    for node in living:
        own = crowd.own_records(node)
        assert own[killed_at + 1] == crowd.book.records[killed_at]
        assert all(record == crowd.book.records[round_ - 1] for round_, record in own.items())

    indices = {node.name: crowd.index(node) for node in crowd.nodes}
    for node in dead:
        crowd.start(node)
    crowd.wait_counted(dead, 60)
    crowd.wait_agreed(crowd.nodes)
    assert {node.name: crowd.index(node) for node in crowd.nodes} == indices, "the same peers as before"
    assert list(crowd.book.disagreements()) == []


def test_everything_killed_at_once_goes_on_from_disk(crowd: Swarm) -> None:
    crowd.wait_rounds(5)
    everything = [crowd.coordinator, *crowd.nodes]
    crowd.rng.shuffle(everything)
    for program in everything:
        program.kill()
    committed, digests = crowd.head(), list(crowd.book.digests)
    crowd.start_coordinator()
    for node in crowd.nodes:
        crowd.start(node)
    crowd.wait_counted(crowd.nodes, 60)
    assert crowd.book.digests[:committed] == digests, "no committed round is lost"
    crowd.wait_agreed(crowd.nodes)
    assert list(crowd.book.disagreements()) == []
    for node in crowd.nodes:
        assert "Traceback" not in node.text(whole=True), node.name
