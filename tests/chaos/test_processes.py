"""Real processes over libp2p on loopback, from the first round to the last: one is frozen, one is killed, the
coordinator is killed; once the run is stopped all end by themselves, and equal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.chaos.harness import Swarm

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

N_WORKED = 20
SETTINGS = {
    # The built-in task this time: the text that comes with Python, and a small transformer.
    "task.name": "text",
    "task.layers": 2,
    "task.heads": 4,
    "task.context": 32,
    "task.held_out_bytes": 2048,
}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Three nodes; they end in the last test."""
    with Swarm(tmp_path_factory.mktemp("whole"), 3, settings=SETTINGS) as swarm:
        yield swarm


def test_a_frozen_node_stalls_nobody_and_catches_up(swarm: Swarm) -> None:
    frozen = swarm.nodes[0]
    frozen.freeze()
    swarm.wait_rounds(10, 30)
    after = swarm.book.head
    swarm.wait_rounds(2)
    assert not swarm.is_counted(frozen, after)
    frozen.thaw()
    swarm.wait_counted(swarm.nodes, 30)


def test_a_killed_node_comes_back_as_the_same_peer(swarm: Swarm) -> None:
    node = swarm.nodes[1]
    node.kill()
    killed_at = swarm.head()
    swarm.wait_rounds(3)
    swarm.start(node)
    swarm.wait_counted([node], 60)
    assert swarm.book.head > killed_at + 3, "the others went on while it was away"
    assert "as peer 3" not in swarm.coordinator.text(), "it is the same peer as before"


def test_a_killed_coordinator_goes_on_where_its_ledger_ends(swarm: Swarm) -> None:
    swarm.coordinator.kill()
    committed, digests = swarm.head(), list(swarm.book.digests)
    for node in swarm.nodes:
        swarm.wait_text(node, "the coordinator does not answer")
        assert node.is_running
    swarm.start_coordinator()  # with the same ticket
    swarm.wait_counted(swarm.nodes, 30)
    assert len(digests) == committed
    assert swarm.book.digests[:committed] == digests


def test_all_end_by_themselves_and_equal(swarm: Swarm) -> None:
    """Of a run that is stopped: how many rounds fit into what came before is the machine's affair."""
    after, indices = swarm.head(), {swarm.index(node) for node in swarm.nodes}

    def all_have_worked() -> bool:
        swarm.head()
        counted = Counter(offer.peer for body in swarm.book.commits[after:] for offer in body.offers)
        return all(counted[index] >= N_WORKED for index in indices)

    swarm.wait(all_have_worked, 60, f"{N_WORKED} offers of each count")
    swarm.order(swarm.coordinator, "stop")
    results = []
    for node in swarm.nodes:
        assert swarm.wait_end(node, 90) == 0, node.text()
        assert "Traceback" not in node.text(whole=True)
        results.append(json.loads(node.stdout()))
    assert swarm.wait_end(swarm.coordinator, 70) == 0
    n_rounds = swarm.head()
    assert {r["rounds"] for r in results} == {n_rounds}
    assert len({r["fingerprint"] for r in results}) == 1
    assert results[0]["counted"] < n_rounds, "it was frozen"
    assert all(r["counted"] >= N_WORKED for r in results), "all took part"
    assert list(swarm.book.disagreements()) == []
