"""Joining late, from holders that die or whose disk has lost a bit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.chaos.faults import corrupt, forget, snapshots_of
from tests.chaos.harness import Swarm
from thinwire.node.cli.status import fetch_status
from thinwire.node.snapshots.format import CHUNK_BYTES

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

SETTINGS = {
    # 2.1 million parameters: snapshots of two chunks and a bit. Payloads are just too large to travel
    # inside the commits, so the coordinator throws old ones away, and nobody begins at the base weights.
    "task.layers": 2,
    "task.width": 1024,
    "run.snapshot_every": 10,
    "strategy.compressor.name": "dct_topk",
    "strategy.compressor.group_size": 65536,
    "strategy.compressor.k": 96,
}
N_CHUNKS = 3


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Three nodes that have trained for so long that a joiner needs a snapshot."""
    swarm = Swarm(tmp_path_factory.mktemp("join"), 3, settings=SETTINGS, strings=True)
    for node in swarm.nodes:  # one file for all: an order in it is carried out by whoever is the first
        node.orders = swarm.folder / "holders.orders"
    with swarm:
        swarm.wait(lambda: swarm.head() >= 25, 90, "two snapshots")
        yield swarm


def test_a_donor_dies_half_way_and_at_most_one_chunk_comes_twice(swarm: Swarm) -> None:
    holders = list(swarm.nodes)
    holders[0].order(do="die", phase="serve", edge="before", passes=2)
    joiner = swarm.add()
    swarm.start(joiner)
    swarm.wait_text(joiner, "took the replica after round", 60)
    (donor,) = [node for node in holders if not node.is_running]
    assert "doomed: dies before serve" in donor.text(), "it was asked for a second chunk"
    swarm.wait_counted([joiner], 60)
    figures = fetch_status(swarm.ticket)["peers"]
    (received,) = [p["received_bytes"] for p in figures if p["peer_id"] == joiner.peer_id]
    assert received < (N_CHUNKS + 1) * CHUNK_BYTES
    swarm.start(donor)
    swarm.wait_counted(swarm.nodes, 60)
    swarm.wait_agreed(swarm.nodes)


def test_a_damaged_chunk_is_refused_by_name_and_taken_from_elsewhere(swarm: Swarm) -> None:
    holder, joiner = swarm.nodes[1], swarm.nodes[-1]
    joiner.kill()
    forget(joiner)
    damaged: set[Path] = set()

    def damage_and_look() -> bool:
        """This holder's disk loses a bit of every chunk of every snapshot, as soon as it is there."""
        for path in set(snapshots_of(holder)) - damaged:
            damaged.add(path)
            with suppress(FileNotFoundError):
                for at in range(100, path.stat().st_size, CHUNK_BYTES):
                    corrupt(path, at)
        return "took the replica after round" in joiner.text()

    damage_and_look()
    swarm.start(joiner)
    swarm.wait(damage_and_look, 60, f"{joiner.name} has a snapshot")
    assert re.search(r"chunk \d of the snapshot of round \d+ is damaged and not served", holder.text())
    swarm.wait_counted([joiner], 60)
    swarm.wait_agreed(swarm.nodes)
    assert list(swarm.book.disagreements()) == []
