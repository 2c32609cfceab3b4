"""Coordinators whose disks are full: nothing is half done, and they go on when there is room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.support.committee import SEATS
from tests.support.full_disk import full_disk
from tests.support.seat_world import Peer, SeatWorld, until
from thinwire.compression.errors import ConfigError, DiskError
from thinwire.coordinator.control.orders import Order, no_strategy
from thinwire.coordinator.control.owner import give_order
from thinwire.coordinator.protocol.messages import GenesisBody
from thinwire.coordinator.seats.driving import council
from thinwire.coordinator.seats.ticket import FILE_NAME


@pytest.fixture
def world(tmp_path: Path, make_genesis: Callable[..., GenesisBody]) -> SeatWorld:
    return SeatWorld(tmp_path, make_genesis(rounds=10_000))


def test_seats_go_on_when_there_is_room_again(world: SeatWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(council, "DISK_PAUSE_S", 0.2)

    async def scene() -> None:
        world.named(0, 1, 2)
        for n in range(3):
            await world.start(n)
        leader = world.servers[await world.led()]
        with full_disk():
            async with Peer(world):  # it has to be admitted, by the leader's ledger
                await until(lambda: leader.reign is None)
            before = dict(world.network.transports)
            for seat in SEATS[:3]:
                await before[seat].close()
                before[seat].died.set()
            await until(
                lambda: all(world.network.transports.get(s) not in (None, before[s]) for s in SEATS[:3])
            )
        async with Peer(world, 10_000), Peer(world) as peer:
            await until(lambda: len(peer.commits) > 3)
        assert [server.failure for server in world.servers.values()] == [None] * 3

    asyncio.run(_closing(world, scene()))


def test_alone_it_refuses_what_it_cannot_write_and_ends_when_that_is_a_record(world: SeatWorld) -> None:
    async def refused(order: Order) -> str:
        with pytest.raises(ConfigError) as e:
            await asyncio.to_thread(give_order, world.folder(0), order, no_strategy, bool, bool)
        return str(e.value)

    async def scene() -> None:
        await world.found()
        token = (world.folder(0) / "token").read_text()
        with full_disk():
            for order in (
                Order(what="rotate-token"),
                Order(what="ban", peers=(SEATS[1],)),
                Order(what="seats", rounds=3),
            ):
                assert "cannot be written: File too large" in await refused(order)
            assert world.servers[0].failure is None
            assert "the ledger cannot be written" in await refused(Order(what="extend", rounds=3))
            with pytest.raises(DiskError, match=r"ledger\.db cannot be written: .* Make room on that disk"):
                await world.servers[0].run_until_finished()
        assert (world.folder(0) / "token").read_text() == token
        assert not (world.folder(0) / FILE_NAME).exists()

    asyncio.run(_closing(world, scene()))


async def _closing(world: SeatWorld, scene: Coroutine[Any, Any, None]) -> None:
    try:
        await scene
    finally:
        await world.close()
