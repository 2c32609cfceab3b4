"""Three coordinators and three nodes as processes: the leader freezes, is killed, all are, most for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.coordinators import Coordinator
from tests.chaos.harness import Swarm

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

NEXT_COMMIT_S = 10.0


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """The last test leaves it with a committee of one."""
    with Swarm(tmp_path_factory.mktemp("committee"), 3, n_seats=3) as swarm:
        yield swarm


def begin_again(swarm: Swarm, one: Coordinator) -> None:
    one.begin_again()
    swarm.wait(lambda: one.ledger.exists() and swarm.head_of(one) >= swarm.head(), 30, "it has caught up")


def all_is_well(swarm: Swarm) -> None:
    swarm.wait_counted(swarm.nodes, 40)
    swarm.wait_agreed(swarm.nodes)
    assert list(swarm.book.disagreements()) == []
    swarm.book.compare()
    assert not swarm.book.forks
    for program in (*swarm.coordinators.all, *swarm.nodes):
        assert "Traceback" not in program.text(whole=True), program.name


def test_the_leader_freezes_or_is_killed_and_the_next_commit_comes_soon(swarm: Swarm) -> None:
    for break_, mend in (
        (Coordinator.freeze, Coordinator.thaw),
        (Coordinator.kill, lambda leader: begin_again(swarm, leader)),
    ):
        swarm.wait_rounds(3)
        leader = swarm.coordinators.leader()
        break_(leader)
        head, digests = swarm.head(), list(swarm.book.digests)
        swarm.wait(lambda: swarm.head() > head, NEXT_COMMIT_S, "a commit by another coordinator")  # noqa: B023
        assert swarm.coordinators.leader() is not leader
        assert swarm.book.digests[:head] == digests[:head]
        mend(leader)
    all_is_well(swarm)


def test_all_killed_at_once_go_on_where_their_ledgers_end(swarm: Swarm) -> None:
    everything = [*swarm.coordinators.all, *swarm.nodes]
    swarm.rng.shuffle(everything)
    for program in everything:
        program.kill()
    committed, digests = swarm.head(), list(swarm.book.digests)
    for one in swarm.coordinators.all:
        one.begin_again()
    for node in swarm.nodes:
        swarm.start(node)
    swarm.wait(lambda: swarm.head() > committed, 40, "the next commit")
    assert swarm.book.digests[:committed] == digests[:committed], "no committed round is lost"
    all_is_well(swarm)


def test_a_lost_majority_is_told_and_the_recovery_key_goes_on(swarm: Swarm) -> None:
    survivor, *lost = swarm.coordinators.all
    for one in lost:
        one.kill()
    swarm.wait_text(survivor, "1 of 3 coordinators reachable; training waits until 2 are", NEXT_COMMIT_S)
    swarm.wait_text(swarm.nodes[0], "1 of 3 coordinators reachable; training waits until 2 are", 5)
    for program in (survivor, swarm.nodes[0]):
        assert f"thinwire coordinator --state {survivor.state} --recover" in program.text()
    head, digests = swarm.head(), list(swarm.book.digests)
    survivor.kill()
    survivor.begin_again("--recover", "--recover-wait", "8s")
    swarm.wait(lambda: swarm.head() > head + 1, 46, "a commit of the committee of one")
    assert swarm.book.digests[:head] == digests[:head]
    all_is_well(swarm)
    assert swarm.coordinators.seats() == [survivor]
