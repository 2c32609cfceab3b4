"""A bit of a replica flips, in memory: found, named and healed, while everybody else trains on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.chaos.faults import HEALED
from tests.chaos.harness import Swarm
from tests.chaos.program import Node

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

CHECKS = "checking this one against the ledger"


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Two nodes; the second test adds one more."""
    with Swarm(tmp_path_factory.mktemp("flip"), 2, strings=True) as swarm:
        yield swarm


def flip(swarm: Swarm, node: Node, found_at: int) -> None:
    """Flips a bit of `node`, so that the next fingerprint is that of a round which is `found_at` beyond a
    multiple of snapshot_every, and asserts what has to come of it."""
    every = swarm.settings["run.snapshot_every"]
    soon = swarm.head() + 5
    round_ = soon + (found_at - 5 - soon) % every
    before = {n.name: n.text().count(HEALED) for n in swarm.nodes}
    others = [n for n in swarm.nodes if n is not node]
    node.order(do="flip", parameter="0.weight", element=swarm.rng.randrange(1000), bit=20, round=round_)
    swarm.wait(lambda: node.text().count(HEALED) > before[node.name], 60, f"{node.name} heals itself")
    flipped_at = int(re.findall(r"doomed: bit 20 .*, at round (\d+)", node.text())[-1])
    healed = re.findall(rf"{HEALED} (\d+), in (.+?): healed", node.text())[before[node.name]]
    assert int(healed[0]) % every == found_at, "too slow: another round was hit"
    assert flipped_at < int(healed[0]) <= flipped_at + swarm.settings["run.verify_every"]
    assert healed[1] == "0.weight", "the tensor is named"

    swarm.wait_counted(swarm.nodes, 60)  # who was right tests its kernels first
    swarm.wait_agreed(swarm.nodes)
    for other in others:
        assert other.text().count(HEALED) == before[other.name], "nobody else is touched"
    # What was wrong was reported anew from the replay.
    assert list(swarm.book.disagreements()) == []


@pytest.mark.parametrize("number", [0, 1])
def test_one_against_one_the_ledger_decides(swarm: Swarm, number: int) -> None:
    flip(swarm, swarm.nodes[number], found_at=10)


@pytest.mark.parametrize("found_at", [0, 10])
def test_one_of_three_heals_and_the_others_never_stop(swarm: Swarm, found_at: int) -> None:
    """Also where the others have a snapshot of the very round at which the fingerprints differ."""
    if len(swarm.nodes) == 2:
        swarm.start(swarm.add())
        swarm.wait_counted(swarm.nodes, 40)
    head, checks = swarm.head(), [node.text().count(CHECKS) for node in swarm.nodes[:2]]
    flip(swarm, swarm.nodes[2], found_at)
    # Nobody took the others for wrong, nobody waited for them; on busy cores an offer is late now and then.
    assert [node.text().count(CHECKS) for node in swarm.nodes[:2]] == checks
    both = [len(body.offers) >= 2 for body in swarm.book.commits[head:] if body.evaluator is None]
    assert sum(both) >= 3 / 4 * len(both)
