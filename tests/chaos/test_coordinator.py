"""A coordinator that lost something: put back to an older copy of its state directory, or forked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.harness import Swarm

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Three nodes; the last test leaves them with a forked coordinator."""
    with Swarm(tmp_path_factory.mktemp("three"), 3) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def older(swarm: Swarm) -> tuple[Path, int]:
    """A copy of the coordinator's state directory, and its head."""
    copy = swarm.folder / "older"
    return copy, swarm.coordinator.copy(copy)


def test_restored_from_an_older_copy_it_gets_the_missing_commits_back(
    swarm: Swarm, older: tuple[Path, int]
) -> None:
    copy, old_head = older
    swarm.wait_rounds(15)
    swarm.coordinator.kill()
    head, digests = swarm.head(), list(swarm.book.digests)
    assert head > old_head + 10
    swarm.coordinator.put_back(copy)
    assert swarm.head() == old_head
    swarm.start_coordinator()
    swarm.wait(lambda: swarm.head() > head, 40, f"a round after {head}")
    assert swarm.book.digests[:head] == digests, "the same commits, none made anew"
    swarm.wait_counted(swarm.nodes)
    swarm.wait_agreed(swarm.nodes)
    assert list(swarm.book.disagreements()) == []


def test_a_fork_of_the_ledger_is_refused_and_nothing_is_overwritten(
    swarm: Swarm, older: tuple[Path, int]
) -> None:
    copy, old_head = older
    for program in (swarm.coordinator, *swarm.nodes):
        program.kill()
    before = [swarm.own_records(node) for node in swarm.nodes]
    swarm.coordinator.put_back(copy)
    swarm.start_coordinator()
    stranger = swarm.add()
    swarm.start(stranger)
    swarm.wait(lambda: swarm.head() > old_head + 1, 60, "the old ledger goes on with a stranger alone")
    for node in swarm.nodes[:-1]:
        swarm.start(node)
    for node, records in zip(swarm.nodes, before, strict=False):
        assert swarm.wait_end(node, 40) == 1, node.text()
        assert "Traceback" not in node.text()
        assert "thinwire: " in node.text()
        assert "ledger" in node.text().split("thinwire: ")[1]
        assert swarm.own_records(node) == records
