"""A transport that is begun early, with libp2p itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import load_or_create
from thinwire.coordinator.protocol.p2p import P2PTransport, start_p2p
from thinwire.node.links.connecting.begun import Begun

pytestmark = pytest.mark.usefixtures("own_temp_folder")


def test_what_is_begun_early_goes_to_whoever_asks_first(tmp_path: Path) -> None:
    made: list[P2PTransport] = []

    async def opened(name: str) -> P2PTransport:
        made.append(await start_p2p(load_or_create(tmp_path / name)))
        return made[-1]

    async def body() -> None:
        begun = Begun(opened, "a")
        assert await begun("a") is made[0]
        await begun.close()
        assert psutil.pid_exists(made[0].daemon.pid), "it is whose who asked"
        assert await begun("b") is made[1]
        unused = Begun(opened, "c")
        while len(made) < 3:
            await asyncio.sleep(0.01)
        await unused.close()
        assert made[2].died.is_set()
        await Begun(opened, "d").close()
        assert len(made) == 3
        for transport in made:
            await transport.close()

    asyncio.run(body())


def test_what_cannot_be_begun_is_raised_when_it_is_asked_for(tmp_path: Path) -> None:
    async def body() -> None:
        begun = Begun(start_p2p, load_or_create(tmp_path / "id"), host="no address")
        with pytest.raises(ConfigError, match="no address"):
            await begun()
        unused = Begun(start_p2p, load_or_create(tmp_path / "id"), host="no address")
        await asyncio.sleep(0)
        await unused.close()

    asyncio.run(body())
