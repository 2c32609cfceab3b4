"""Nodes with wide lines pass on what others have made, and one of them stands still, or dies, half way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.harness import Swarm
from tests.chaos.program import Node
from thinwire.coordinator.policy import deadline_s
from thinwire.node.links.payloads import LONG_WAIT_S

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

SETTINGS = {
    "strategy.compressor.name": "dense",  # payloads of 133 kB
    "run.verify_every": 4,
    "run.snapshot_every": 1000,
}
NARROW_BYTES_PER_S = 1e6
WIDE_BYTES_PER_S = 4e6
ROUNDS = 4

MOST_MISSED = round(2 * LONG_WAIT_S / deadline_s([0.0])) + 2
"""Rounds running that a node misses for a lost relay: nothing comes from that one for `LONG_WAIT_S`, nor from
whom the coordinator names then, and no round without one of its offers is shorter than the least deadline;
the round in which it was lost, and the one in which the payloads are here again, besides."""


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Four nodes; the first has the widest line, then the second. The coordinator is told that it has next to
    none. Every test leaves them training."""
    folder = tmp_path_factory.mktemp("pass")
    with Swarm(folder, 4, settings=SETTINGS, proxied=True, strings=True, upload="1kB/s") as swarm:
        give_line(swarm.nodes[1], WIDE_BYTES_PER_S)
        for node in swarm.nodes[2:]:
            give_line(node, NARROW_BYTES_PER_S)
        yield swarm


def give_line(node: Node, bytes_per_s: float) -> None:
    assert node.proxy is not None
    node.proxy.slow(rate_bytes_per_s=bytes_per_s)


def others_soon_lose_nothing(swarm: Swarm, lost: Node) -> None:
    """Before long each of the others counts in one round after the other."""
    after = swarm.head()
    others = [node for node in swarm.nodes if node is not lost]
    indices = {swarm.index(node) for node in others}

    def all_count() -> bool:
        swarm.head()
        newest = swarm.book.commits[after:][-ROUNDS:]
        return len(newest) == ROUNDS and all(indices <= {o.peer for o in body.offers} for body in newest)

    swarm.wait(all_count, 30, f"{ROUNDS} rounds running with all others than {lost.name}")
    for index in indices:
        counts = [
            "#" if index in {o.peer for o in body.offers} else "." for body in swarm.book.commits[after:]
        ]
        assert "." * (MOST_MISSED + 1) not in "".join(counts), f"peer {index}"
    assert not swarm.is_counted(lost, swarm.book.head - ROUNDS + 2)
    swarm.wait_agreed(others)


def all_are_back(swarm: Swarm) -> None:
    swarm.wait_counted(swarm.nodes)
    swarm.wait_agreed(swarm.nodes)
    assert list(swarm.book.disagreements()) == []
    for program in (swarm.coordinator, *swarm.nodes):
        assert "Traceback" not in program.text(whole=True), program.name


def test_who_passes_payloads_on_stands_still_half_way(swarm: Swarm) -> None:
    relay = swarm.nodes[0]
    relay.order(do="stop", phase="pass on", edge="before", round=6)  # when deadlines are known
    swarm.wait(lambda: relay.was_obeyed, 60, f"{relay.name} passes payloads on")
    relay.freeze()  # its daemon, too
    others_soon_lose_nothing(swarm, relay)
    relay.thaw()
    all_are_back(swarm)


def test_who_passes_payloads_on_dies_half_way(swarm: Swarm) -> None:
    relay = swarm.nodes[1]
    give_line(swarm.nodes[0], NARROW_BYTES_PER_S)
    relay.order(do="die", phase="pass on", edge="before")
    swarm.wait(lambda: not relay.is_running, 60, f"{relay.name} passes payloads on")
    others_soon_lose_nothing(swarm, relay)
    swarm.start(relay)
    all_are_back(swarm)
