"""What can happen to a committee: the courses of faults whose victim is a coordinator; see `faults`.

`Swarm.struck` says when the harm was done, and after which round: the next commit counts from then, or, where
nobody could have made one (`is_total`), from when everything is there again.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.coordinators import Coordinator
from tests.chaos.faults import Course, Kind, NotHarmed, Until, for_s
from tests.chaos.harness import Swarm
from tests.chaos.program import Node, Program

FROZEN_S = 30.0
CUT_S = 12.0
FULL_S = 8.0
NEW_SEATS = 5


def leader_killed(swarm: Swarm, node: Node) -> Course:
    """At any moment of a round."""
    yield for_s(swarm.rng.random() * 0.5)
    leader = swarm.coordinators.leader()
    leader.kill()
    swarm.strike()
    yield for_s(swarm.rng.choice((0.0, 2.0, 8.0)))
    leader.begin_again()
    return caught_up(swarm, leader)


def leader_frozen(swarm: Swarm, node: Node) -> Course:
    leader = swarm.coordinators.leader()
    leader.freeze()
    swarm.strike()
    yield for_s(FROZEN_S)
    leader.thaw()
    return caught_up(swarm, leader)


def leader_killed_with_node(swarm: Swarm, node: Node) -> Course:
    """As when they share a machine."""
    leader = swarm.coordinators.leader()
    leader.kill()
    node.kill()
    swarm.strike()
    yield for_s(swarm.rng.choice((1.0, 8.0)))
    leader.begin_again()
    swarm.start(node)
    is_back = caught_up(swarm, leader)
    after = swarm.head()
    return lambda: is_back() and swarm.is_counted(node, after)


def follower_killed(swarm: Swarm, node: Node) -> Course:
    one = follower(swarm)
    one.kill()
    swarm.strike()
    yield for_s(swarm.rng.choice((0.0, 5.0)))
    one.begin_again()
    return caught_up(swarm, one)


def cut_off(*, hears: bool) -> Callable[[Swarm, Node], Course]:
    """The leader: one way only."""

    def course(swarm: Swarm, node: Node) -> Course:
        leader = swarm.coordinators.leader()
        swarm.coordinators.cut_one_way(leader, hears=hears)
        swarm.strike()
        yield for_s(CUT_S)
        swarm.coordinators.heal()
        return caught_up(swarm, leader)

    return course


def disk_full(swarm: Swarm, node: Node) -> Course:
    """The leader's."""
    leader = swarm.coordinators.leader()
    disk = swarm.disks.get(leader.number)
    if disk is None:
        raise NotHarmed("the leader has no small disk of its own")
    disk.fill()
    swarm.strike()
    yield for_s(FULL_S)
    disk.free()
    if not leader.is_running:
        leader.begin_again()
    return caught_up(swarm, leader)


def all_killed(swarm: Swarm, node: Node) -> Course:
    """But node 0, which lives from the beginning to the end."""
    everything: list[Program] = [*swarm.coordinators.all, *(n for n in swarm.nodes if n.number > 0)]
    swarm.rng.shuffle(everything)
    for program in everything:
        program.kill()
    swarm.strike()
    yield for_s(1.0)
    for one in swarm.coordinators.all:
        one.begin_again()
    for each in swarm.nodes:
        if not each.is_running:
            swarm.start(each)
    after = swarm.head()
    return lambda: all(swarm.is_counted(each, after) for each in swarm.nodes)


def old_copy_restored(swarm: Swarm, node: Node) -> Course:
    """A backup without its votes, or the image of a disk, which is started as such. It votes again once a
    record says so."""
    one, is_image = follower(swarm), swarm.rng.random() < 0.5
    copy = swarm.folder / f"copy-{swarm.head()}"
    one.copy(copy, votes=is_image)
    after = swarm.head()
    yield lambda: swarm.book.head > after + 5
    one.kill()
    one.put_back(copy)
    swarm.strike()
    one.begin_again(*(["--restored"] if is_image else []))
    yield for_s(0.0)
    begun, peer_id, is_back = swarm.head(), one.peer_id, caught_up(swarm, one)
    return lambda: (
        any(entry.seat == peer_id for body in swarm.book.commits[begun:] for entry in body.reseat)
        and is_back()
    )


def seat_replaced(swarm: Swarm, node: Node) -> Course:
    """Its machine is lost; another one takes its place."""
    lost = follower(swarm)
    peer_id = lost.peer_id
    lost.kill()
    swarm.strike()
    yield for_s(1.0)
    new = swarm.coordinators.add()
    swarm.coordinators.replica(new, "--replace", peer_id)
    yield lambda: not swarm.coordinators.named(peer_id)
    swarm.coordinators.retire(lost)
    return caught_up(swarm, new)


def two_added(swarm: Swarm, node: Node) -> Course:
    """Three become five and, after a while, three again."""
    if len(swarm.coordinators.all) != NEW_SEATS - 2:
        raise NotHarmed("there are more already")
    new = [swarm.coordinators.add() for _ in range(2)]
    for one in new:
        swarm.coordinators.replica(one)
    swarm.strike()
    swarm.order(swarm.coordinators.leader(), "seats", str(NEW_SEATS))
    yield lambda: all((one.state / "key").exists() and swarm.coordinators.named(one.peer_id) for one in new)
    yield for_s(5.0)
    for one in new:
        peer_id = one.peer_id
        swarm.order(swarm.coordinators.leader(), "remove", peer_id)
        yield lambda: not swarm.coordinators.named(peer_id)  # noqa: B023 - used up in this turn
        swarm.coordinators.retire(one)
    return lambda: True


def follower(swarm: Swarm) -> Coordinator:
    leader = swarm.coordinators.leader()
    return swarm.rng.choice([one for one in swarm.coordinators.all if one is not leader])


def caught_up(swarm: Swarm, one: Coordinator) -> Until:
    """Up to what there is at this moment."""
    head = swarm.head()
    return lambda: swarm.head_of(one) >= head


LEADER_KILLED = Kind("leader killed", leader_killed, hits_node=False)
SEAT_KINDS = (
    *[LEADER_KILLED] * 4,
    Kind("leader frozen for 30 s", leader_frozen, hits_node=False),
    Kind("leader and a node killed", leader_killed_with_node, hits_node=False, takes_node=True),
    Kind("follower killed", follower_killed, hits_node=False),
    Kind("leader only hears", cut_off(hears=True), hits_node=False),
    Kind("leader is only heard", cut_off(hears=False), hits_node=False),
    Kind("leader's disk full", disk_full, hits_node=False),
    Kind("all killed at once", all_killed, hits_node=False, takes_node=True, is_total=True),
    Kind("old copy restored", old_copy_restored, hits_node=False),
    Kind("seat replaced", seat_replaced, hits_node=False),
    Kind("three to five to three", two_added, hits_node=False),
)
