"""The local door of a coordinator: who may knock, what is read there, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thinwire.compression.errors import ConfigError, LedgerCorrupt, SwarmUnreachable
from thinwire.coordinator.control import door as doors
from thinwire.coordinator.control import owner
from thinwire.coordinator.control.door import Door
from thinwire.coordinator.control.orders import MAX_NAMED, Order, Ordered, no_strategy
from thinwire.coordinator.control.owner import give_order, status_within, write_order
from thinwire.coordinator.control.wire import HEAD, MAX_FRAME, SOCKET_NAME, Answer, frame, socket_path
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.files import FolderLock
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.protocol.messages import Change, GenesisBody, decode_record, encode_record
from thinwire.coordinator.state import StateDir

EXTEND = Order(what="extend", rounds=5)


class Keeper:
    """Takes every order but `stop`, and `pause`, which it cannot write; its record comes when the test says
    so."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.foreseen: list[Order] = []
        self.head = 0
        self.n_bad = 0

    def door(self, folder: Path) -> Door:
        is_in_ledger = lambda ordered: ordered.round <= self.head  # noqa: E731
        return Door(folder, self.order, is_in_ledger, self.count_bad, self.foresee, self.status)

    def status(self) -> dict[str, Any]:
        return {"state": "training", "peers": ["x" * 100] * 1000}  # more than an order may have

    async def foresee(self, order: Order) -> None:
        self.foreseen.append(order)

    def order(self, order: Order) -> Ordered:
        assert self.foreseen[-1] is order
        if order.what == "stop":
            raise ConfigError("no")
        if order.what == "pause":
            raise OSError(errno.ENOSPC, "no room", "somewhere")
        self.orders.append(order)
        return Ordered(3, ("run.rounds 5 -> 10",), ())

    def count_bad(self) -> None:
        self.n_bad += 1


async def answers(folder: Path, data: bytes, *, leaves: bool = False) -> list[Answer]:
    """Everything that comes back for these bytes. `leaves`: nothing comes after them."""
    with socket_path(folder) as path:
        reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    if leaves:
        writer.write_eof()
    found = []
    while head := await reader.read(HEAD.size):
        (n_bytes,) = HEAD.unpack(head)
        found.append(decode_record(Answer, await reader.readexactly(n_bytes)))
    writer.close()
    return found


def folder_of(tmp_path: Path, length: int = 0) -> Path:
    folder = tmp_path / ("x" * length + "state")
    folder.mkdir(mode=0o700)
    return folder


@pytest.mark.parametrize("length", [0, 150])
def test_an_order_is_planned_and_then_done(tmp_path: Path, length: int) -> None:
    """With a path that is too long for a socket, too."""
    folder, keeper = folder_of(tmp_path, length), Keeper()
    (folder / SOCKET_NAME).touch()  # what a process that was killed has left

    async def run() -> None:
        door = keeper.door(folder)
        await door.open()
        mode = (folder / SOCKET_NAME).stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o600)
        asked = asyncio.create_task(answers(folder, frame(EXTEND)))
        while not keeper.orders:
            await asyncio.sleep(0.01)
        assert not asked.done()
        door.committed(2)
        keeper.head = 3
        door.committed(3)
        assert [a.what for a in await asked] == ["planned", "done"]
        assert keeper.orders == [EXTEND]
        assert [(a.what, a.text) for a in await answers(folder, frame(Order(what="stop")))] == [
            ("refused", "no")
        ]
        (said,) = await answers(folder, frame(Order(what="pause")))
        assert said.what == "refused"
        assert said.text.startswith("somewhere cannot be written: no room")
        waits = asyncio.create_task(answers(folder, frame(EXTEND.model_copy(update={"rounds": 1}))))
        keeper.head = 0
        while len(keeper.orders) < 2:
            await asyncio.sleep(0.01)
        await door.close()
        await door.close()
        assert [a.what for a in await waits][-1] == "refused"

    asyncio.run(run())
    assert list(folder.iterdir()) == []


def test_who_leaves_before_the_record_comes_keeps_no_place(tmp_path: Path) -> None:
    folder, keeper = folder_of(tmp_path), Keeper()
    (folder / "key").touch()
    (folder / "ledger.db").touch()

    async def run() -> None:
        door = keeper.door(folder)
        await door.open()
        for _ in range(doors.MAX_OWNERS + 1):
            assert [a.what for a in await answers(folder, frame(EXTEND), leaves=True)] == ["planned"]
        assert len(keeper.orders) == doors.MAX_OWNERS + 1, "what was ordered stays ordered"
        stays = [asyncio.create_task(answers(folder, frame(EXTEND))) for _ in range(doors.MAX_OWNERS)]
        while len(keeper.orders) < 2 * doors.MAX_OWNERS + 1:
            await asyncio.sleep(0.01)
        with pytest.raises(ConfigError, match="too many orders are waiting"):
            await asyncio.to_thread(ask, folder, EXTEND)
        keeper.head = 3
        door.committed(3)
        assert [[a.what for a in found] for found in await asyncio.gather(*stays)] == [
            ["planned", "done"]
        ] * doors.MAX_OWNERS
        await door.close()

    asyncio.run(run())


def test_the_status_is_told_to_whoever_has_the_folder(tmp_path: Path) -> None:
    folder, keeper = folder_of(tmp_path), Keeper()
    assert status_within(folder) is None, "nobody listens"

    async def run() -> dict[str, Any] | None:
        door = keeper.door(folder)
        await door.open()
        found = await asyncio.to_thread(status_within, folder)
        await door.close()
        return found

    assert asyncio.run(run()) == keeper.status()
    assert (keeper.orders, keeper.foreseen, keeper.n_bad) == ([], [], 0)


def test_bytes_that_are_no_order_are_refused_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, keeper = folder_of(tmp_path), Keeper()
    whole = frame(EXTEND)
    bad = [
        struct.pack("<I", 2**31),
        struct.pack("<I", 5) + b"hello",
        struct.pack("<I", 0),
        whole[:4] + bytes(len(whole) - 4),
        frame(Answer(what="done")),
    ]

    async def run() -> None:
        door = keeper.door(folder)
        await door.open()
        for data in bad:
            assert [a.what for a in await answers(folder, data)] == ["refused"], data
        assert await answers(folder, whole[:-1], leaves=True) == []
        monkeypatch.setattr(doors, "ORDER_WITHIN_S", 0.2)
        with socket_path(folder) as path:
            reader, writer = await asyncio.open_unix_connection(path)  # says nothing
        assert b"no order" in await reader.read()
        writer.close()
        await door.close()

    asyncio.run(run())
    assert keeper.n_bad == len(bad) + 1
    assert keeper.orders == []


# ------------------------------------------------------------------------------------------ without a server


@pytest.fixture
def folder(tmp_path: Path, make_genesis: Callable[..., GenesisBody]) -> Path:
    """Of a coordinator that was stopped before the first round."""
    with StateDir(tmp_path / "state") as state:
        key = load_or_create(state.key_path)
        genesis = make_genesis(rounds=5).model_copy(update={"coordinator": peer_id_of(key.public_key())})
        Ledger.create(state.ledger_path, genesis, key).close()
    return tmp_path / "state"


def ask(folder: Path, order: Order) -> Answer:
    return give_order(folder, order, no_strategy, lambda _answer: None, lambda: False)


def test_without_a_coordinator_the_record_is_written_at_once(folder: Path) -> None:
    answer = ask(folder, EXTEND)
    assert (answer.what, answer.round, answer.told) == ("done", 1, ("run.rounds 5 -> 11",))
    with pytest.raises(ConfigError, match=r"run\.seed stands in record 0"):
        ask(folder, Order(what="set", changes=(Change(key="run.seed", value=2),)))
    ask(folder, Order(what="stop"))
    with pytest.raises(ConfigError, match="over after round 2"):
        ask(folder, Order(what="pause"))
    key = load_or_create(folder / "key")
    ledger = Ledger.open(folder / "ledger.db", key.public_key())
    bodies = [commit.body for commit in ledger.all_commits()]
    ledger.close()
    assert [(b.round, b.offers, len(b.changes)) for b in bodies] == [(1, (), 1), (2, (), 1)]


def test_only_the_run_s_own_key_writes_a_record(folder: Path, tmp_path: Path) -> None:
    (folder / "key").unlink()
    with pytest.raises(ConfigError, match=r"has no key and ledger.*a ticket does not suffice"):
        ask(folder, EXTEND)
    load_or_create(folder / "key")
    with pytest.raises(LedgerCorrupt, match="not this coordinator's"):
        ask(folder, EXTEND)
    with pytest.raises(ConfigError, match="not the state folder of a coordinator"):
        ask(tmp_path / "nothing", EXTEND)
    assert not (tmp_path / "nothing").exists()


def test_a_folder_in_use_and_a_door_that_is_shut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "CONNECT_S", 0.1)
    lock = FolderLock(folder, "coordinator")
    with pytest.raises(ConfigError, match="in use by another coordinator"):
        write_order(folder, EXTEND, no_strategy)
    with socket.socket(socket.AF_UNIX) as listening:
        with socket_path(folder) as path:
            listening.bind(path)
        listening.listen(2)
        with pytest.raises(SwarmUnreachable, match="does not answer: no answer in time"):
            status_within(folder)
        stopped = iter([False, True])
        with pytest.raises(SwarmUnreachable, match="stopped"):
            give_order(folder, EXTEND, no_strategy, lambda _answer: None, lambda: next(stopped))
    lock.close()
    os.unlink(folder / SOCKET_NAME)


def test_orders_at_the_same_time_come_one_after_the_other(folder: Path) -> None:
    """Without a coordinator each of them has the folder for a moment."""
    lock = FolderLock(folder, "coordinator")
    timer = threading.Timer(0.5, lock.close)
    timer.start()
    assert ask(folder, EXTEND).what == "done"
    timer.join()


def test_order_and_answer_have_bounds() -> None:
    for order in (EXTEND, Order(what="set", changes=(Change(key="strategy.lr", value=0.1),))):
        assert decode_record(Order, encode_record(order)) == order
    with pytest.raises(ValueError, match="less than or equal"):
        Order(what="extend", rounds=2**40)
    most = Order(what="listed", peers=("p" * 52,) * MAX_NAMED)
    assert len(frame(most)) < MAX_FRAME
    with pytest.raises(ValueError, match="at most 32 peers"):
        Order(what="ban", peers=most.peers[:33])


def test_an_owner_hears_that_its_coordinator_leads_no_more(tmp_path: Path) -> None:
    """The record with one order waited for its seal, the other order was in none."""
    folder, keeper = folder_of(tmp_path), Keeper()

    async def run() -> list[list[Answer]]:
        door = keeper.door(folder)
        await door.open()
        found = []
        for proposed in (3, None):
            asked = asyncio.create_task(answers(folder, frame(EXTEND)))
            while not door._waiting:
                await asyncio.sleep(0.01)
            door.reign_ended(proposed)
            found.append(await asked)
        await door.close()
        return found

    proposed, pending = asyncio.run(run())
    assert [answer.what for answer in (*proposed, *pending)] == ["planned", "refused"] * 2
    assert "it may have been written or not. Look at thinwire status" in proposed[-1].text
    assert "in no record yet: say it again" in pending[-1].text
