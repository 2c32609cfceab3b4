"""A disk fills up, a node's and then the coordinator's: told clearly, nothing half-written, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.disk import Disk, small_disk
from tests.chaos.harness import Swarm

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

DISK_BYTES = 4 * 2**20


@pytest.fixture(scope="module")
def swarm_and_disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Swarm, Disk, Disk]]:
    """Three nodes; the first one and the coordinator have 4 MiB of disk each."""
    swarm = Swarm(tmp_path_factory.mktemp("full"), 3)
    with (
        small_disk(swarm.nodes[0].state, DISK_BYTES) as of_node,
        small_disk(swarm.coordinator_state, DISK_BYTES) as of_coordinator,
        swarm,
    ):
        yield swarm, of_node, of_coordinator


def test_a_node_trains_on_without_a_disk(swarm_and_disks: tuple[Swarm, Disk, Disk]) -> None:
    swarm, disk, _ = swarm_and_disks
    node = swarm.nodes[0]
    swarm.wait(lambda: any(node.state.glob("*/snapshots/0*")), 30, "a snapshot of the node")
    disk.fill()
    swarm.wait_text(node, "training goes on")
    swarm.wait_counted([node])
    swarm.wait_agreed(swarm.nodes)
    assert not list(node.state.glob("*/snapshots/.*")), "nothing half-written"
    disk.free()
    had = set(node.state.glob("*/snapshots/0*"))
    swarm.wait(lambda: set(node.state.glob("*/snapshots/0*")) - had, 30, "a new snapshot")
    node.kill()
    swarm.start(node)
    swarm.wait_counted([node], 40)
    swarm.wait_agreed(swarm.nodes)
    assert "Traceback" not in node.text(whole=True)
    assert "damaged" not in node.text()


def test_a_coordinator_stops_with_its_ledger_whole(swarm_and_disks: tuple[Swarm, Disk, Disk]) -> None:
    swarm, _, disk = swarm_and_disks
    disk.fill()
    assert swarm.wait_end(swarm.coordinator, 60) == 1
    said = swarm.coordinator.text()
    assert "Traceback" not in said
    assert "thinwire: " in said
    assert "full" in said.split("thinwire: ")[1]
    committed, digests = swarm.head(), list(swarm.book.digests)
    disk.free()
    swarm.start_coordinator()
    swarm.wait_counted(swarm.nodes, 60)
    assert len(digests) == committed
    assert swarm.book.digests[:committed] == digests
    swarm.wait_agreed(swarm.nodes)
    assert list(swarm.book.disagreements()) == []
