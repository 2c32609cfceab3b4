"""Real processes over libp2p: one of four sends the opposite of its work, a thousand times as large."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.harness import Swarm
from tests.chaos.program import Node

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

SETTINGS = {
    "run.rounds": 40,
    "run.min_peers": 4,
    "run.eval_every": 5,
    "run.verify_every": 5,
    "task.name": "text",
    "task.layers": 1,
    "task.width": 32,
    "task.heads": 2,
    "task.context": 32,
    "task.batch": 4,
    "task.held_out_bytes": 2048,
    "strategy.lr": 3e-3,
    "policy.name": "all",
}


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """A coordinator, and four nodes that are not started yet."""
    made = Swarm(tmp_path / "swarm", 4, settings=SETTINGS)
    try:
        made.start_coordinator()
        yield made
    finally:
        made.end()


def result(node: Node) -> dict[str, object]:
    found: dict[str, object] = json.loads(node.stdout())
    return found


def test_honest_nodes_stay_alike_and_learn(swarm: Swarm) -> None:
    *honest, bad = swarm.nodes
    for node in honest:
        swarm.start(node)
    swarm.start(bad, (str(Path(__file__).parent / "bad_node.py"), "flipped-1e3"))
    programs = [swarm.coordinator, *honest]
    swarm.wait(lambda: not any(p.is_running for p in programs), 150, "the end of the run")
    assert [p.code for p in programs] == [0, 0, 0, 0], swarm.coordinator.text()
    results = [result(node) for node in honest]
    assert {r["rounds"] for r in results} == {40}
    assert len({r["fingerprint"] for r in results}) == 1
    measured = dict(entry for r in results for entry in r["held_out"])
    assert measured[max(measured)] < 0.95 * measured[min(measured)]
    swarm.book.read()
    counted = {offer.peer for body in swarm.book.commits for offer in body.offers}
    assert counted == {0, 1, 2, 3}, "what the bad one sent was an offer like others"
