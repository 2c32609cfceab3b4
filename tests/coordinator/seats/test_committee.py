"""Coordinators that are seats of a committee: whole servers, with real disks, over streams in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.support.seat_world import Peer, SeatWorld, until
from thinwire.coordinator.protocol.messages import GenesisBody

Scene = Callable[[SeatWorld], Coroutine[Any, Any, None]]
Play = Callable[[Scene], None]


@pytest.fixture
def play(tmp_path: Path, make_genesis: Callable[..., GenesisBody]) -> Play:
    def run(scene: Scene) -> None:
        async def whole() -> None:
            world = SeatWorld(tmp_path, make_genesis(rounds=10_000))
            try:
                await scene(world)
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
