"""Coordinators that are seats of a committee: whole servers, with real disks, over streams in one process."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.support.committee import RECOVERY_KEY, SEATS
from tests.support.seat_world import Peer, SeatWorld, until
from thinwire.coordinator.protocol.messages import GenesisBody
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.seats.naming import Wish
from thinwire.coordinator.state import VOTE_NAME, StateDir

Scene = Callable[[SeatWorld], Coroutine[Any, Any, None]]
Play = Callable[[Scene], None]


@pytest.fixture
def play(tmp_path: Path, make_genesis: Callable[..., GenesisBody]) -> Play:
    def run(scene: Scene) -> None:
        async def whole() -> None:
            world = SeatWorld(tmp_path, make_genesis(rounds=10_000))
            try:
                await scene(world)
            except TimeoutError:
                for n, server in world.servers.items():
                    logging.getLogger("thinwire.tests").error("seat %d: %s", n, server.status()["seat"])
                raise
            finally:
                await world.close()

        asyncio.run(whole())

    return run


@pytest.mark.parametrize("payload_bytes", [10, 10_000])
def test_a_killed_leader_is_followed_by_another_and_all_ledgers_are_one(
    play: Play, payload_bytes: int
) -> None:
    async def scene(world: SeatWorld) -> None:
        world.named(0, 1, 2)
        for n in range(3):
            await world.start(n)
        async with Peer(world, payload_bytes) as a, Peer(world, payload_bytes) as b:
            for _ in range(2):
                leader = await world.led()
                head = max(world.heads())
                await until(lambda: len(a.commits) > head + 3)  # noqa: B023
                await world.kill(leader)
                await until(lambda: world.leader not in (None, leader))  # noqa: B023
                await until(lambda: len(b.commits) > max(head + 5, len(a.commits) - 2))  # noqa: B023
                await world.start(leader)
                await until(lambda: len(world.heads()) == 3 and min(world.heads()) > head + 5)  # noqa: B023
            n = min(len(a.commits), len(b.commits))
            assert [c.digest for c in a.commits[:n]] == [c.digest for c in b.commits[:n]]
            seen = [c.digest for c in a.commits]
        await until(lambda: min(world.heads()) == max(world.heads()))
        ledgers = [world.records(n) for n in world.servers]
        assert ledgers[0] == ledgers[1] == ledgers[2]
        assert ledgers[0][: len(seen)] == seen
        assert a.told, "a seat that does not lead says who does"
        assert not any(c.body.round != i for i, c in enumerate(a.commits, 1))

    play(scene)


def test_one_coordinator_becomes_three_while_nodes_train_then_one_is_replaced(play: Play) -> None:
    async def scene(world: SeatWorld) -> None:
        await world.found()
        async with Peer(world, 10_000) as a, Peer(world, 10) as b:
            await until(lambda: len(a.commits) > 3)
            assert world.servers[0].seat_ticket is None, "it orders the run alone, as ever"
            world.servers[0].wish(Wish(n_seats=3))
            await world.join(1)
            assert world.servers[0].status()["seat"]["role"] == "leads"
            head = world.servers[0].head
            await until(lambda: len(a.commits) > head + 3)
            assert world.servers[0].ledger.committee.seats == SEATS[:1], "two would be worse than one"
            await world.join(2)
            await until(lambda: world.servers[0].ledger.committee.seats == SEATS[:3])
            head = max(world.heads())
            await until(lambda: min(len(a.commits), len(b.commits)) > head + 3)
            ticket = Ticket.parse(world.servers[1].ticket.line())
            assert {seat.peer_id for seat in ticket.seats} == set(SEATS[:3])
            assert ticket.token == "secret"
            lost = next(n for n in range(3) if world.servers[n].reign is None)
            await world.kill(lost)
            await world.join(3, wish=Wish(drops=SEATS[lost]))
            others = set(SEATS[:4]) - {SEATS[lost]}
            await until(lambda: set(world.servers[3].ledger.committee.seats) == others)
            head = max(world.heads())
            await until(lambda: min(len(a.commits), len(b.commits)) > head + 3)
        await until(lambda: min(world.heads()) == max(world.heads()))
        assert len({tuple(world.records(n)) for n in world.servers}) == 1

    play(scene)


def test_a_leader_that_is_cut_off_steps_down_and_says_what_is_missing(play: Play) -> None:
    async def scene(world: SeatWorld) -> None:
        world.named(0, 1, 2)
        for n in range(3):
            await world.start(n)
        async with Peer(world) as a, Peer(world) as b:
            old = await world.led()
            await until(lambda: len(a.commits) > 3)
            for n in range(3):
                if n != old:
                    world.network.cut_pair(SEATS[old], SEATS[n])
            await until(lambda: world.servers[old].reign is None)
            await until(lambda: "1 of 3 coordinators" in world.servers[old].watchers.who.now.waits_for)
            head = max(world.heads())
            await until(lambda: min(len(a.commits), len(b.commits)) > head + 3)
            world.network.mend()
            await until(lambda: not world.servers[old].watchers.who.now.waits_for)
        await until(lambda: min(world.heads()) == max(world.heads()))
        assert len({tuple(world.records(n)) for n in world.servers}) == 1

    play(scene)


def test_a_majority_is_lost_and_the_recovery_key_goes_on_from_what_nodes_have(play: Play) -> None:
    async def scene(world: SeatWorld) -> None:
        world.named(0, 1, 2)
        for n in range(3):
            await world.start(n)
        async with Peer(world) as a, Peer(world) as b:
            await until(lambda: len(a.commits) > 3)
            await world.stop(1)
            shutil.copytree(world.folder(1), world.path / "copy")
            await world.start(1)
            head = max(world.heads())
            await until(lambda: min(len(a.commits), len(b.commits)) > head + 3)
            for n in range(3):
                await world.kill(n)
            shutil.rmtree(world.folder(1))
            shutil.copytree(world.path / "copy", world.path / "1")
            with StateDir(world.folder(1)) as state:
                state.forget_votes()
            server = await world.start(1)
            assert server.status()["seat"]["role"] == "rests"
            await until(lambda: "--recover" in server.watchers.who.now.waits_for)
            seen = max(len(a.commits), len(b.commits))
            recovering = asyncio.create_task(server.recover(RECOVERY_KEY, 1.0))
            await until(lambda: server.head >= seen)
            await recovering
            await until(lambda: min(len(a.commits), len(b.commits)) > seen + 3)
            assert server.ledger.committee.seats == (SEATS[1],)
            await world.start(2)  # it was not lost after all: it looks on, and can be named again
            await until(lambda: world.servers[2].head > seen + 3)
            assert world.servers[2].status()["seat"]["role"] == "looks on"
            server.wish(Wish(n_seats=2))
            await until(lambda: set(server.ledger.committee.seats) == set(SEATS[1:3]))
            head = max(world.heads())
            await until(lambda: min(len(a.commits), len(b.commits)) > head + 3)
        await until(lambda: min(world.heads()) == max(world.heads()))
        assert world.records(1) == world.records(2)

    play(scene)


def test_a_leader_whose_disk_is_full_gives_way(play: Play) -> None:
    async def scene(world: SeatWorld) -> None:
        world.named(0, 1, 2)
        for n in range(3):
            await world.start(n)
        async with Peer(world) as a:
            old = await world.led()
            async with Peer(world):
                await until(lambda: len(a.commits) > 3)
                council = world.servers[old]._seat.council  # type: ignore[union-attr]
                council.disk._votes._path = Path("/proc/no-such-folder/vote")
                await until(lambda: world.leader not in (None, old))
                head = max(world.heads())
                await until(lambda: len(a.commits) > head + 3)
                assert "disk" in world.servers[old].status()["seat"]["waits_for"]
                council.disk._votes._path = world.folder(old) / VOTE_NAME

    play(scene)


def test_three_become_five_and_one_goes(play: Play) -> None:
    async def scene(world: SeatWorld) -> None:
        world.named(0, 1, 2)
        for n in range(3):
            await world.start(n)
        async with Peer(world) as a, Peer(world):
            await until(lambda: len(a.commits) > 2)
            for n in (3, 4):
                await world.join(n)
            world.servers[1].wish(Wish(n_seats=5))  # wherever it is said
            await until(lambda: len(world.servers[4].ledger.committee.seats) == 5)
            head = max(world.heads())
            await until(lambda: len(a.commits) > head + 2)
            gone = world.leader
            assert gone is not None
            world.servers[1].wish(Wish())
            world.servers[gone].wish(Wish(n_seats=4, drops=SEATS[gone]))
            others = [n for n in range(5) if n != gone]
            await until(lambda: len(world.servers[others[0]].ledger.committee.seats) == 4)
            head = max(world.heads())
            await until(lambda: world.servers[gone].head > head + 2)
            assert world.servers[gone].status()["seat"]["role"] == "looks on", "it mirrors what others order"

    play(scene)
