"""libp2p starts and stops cleanly, whatever happens to the process that uses it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import WAIT_S, eventually
from thinwire.compression.errors import ConfigError, SwarmUnreachable
from thinwire.coordinator.protocol.addresses import announced, dialable, listen_address, require_free
from thinwire.coordinator.protocol.identity import load_or_create, new_key, peer_id_of
from thinwire.coordinator.protocol.p2p import P2PTransport, start_p2p

pytestmark = pytest.mark.usefixtures("own_temp_folder")
swarm = pytest.mark.swarm

RELAY = "/libp2p/circuit/relay/0.2.0/hop"
"""What a host that carries strangers' traffic serves."""


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def start(folder: Path, name: str = "id", port: int = 0) -> P2PTransport:
    return await start_p2p(load_or_create(folder / name), port=port)


@swarm
def test_two_hosts_talk_and_leave_nothing(tmp_path: Path) -> None:
    async def body() -> list[int]:
        a, b = await start(tmp_path, "a"), await start(tmp_path, "b")
        assert a.peer_id == peer_id_of(load_or_create(tmp_path / "a").public_key())

        async def echo(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(peer_id.encode() + await reader.readexactly(4))
            await writer.drain()

        await a.handle("echo", echo)
        await b.dial(a.peer_id, a.addresses, 5)
        reader, writer = await b.open_stream(a.peer_id, "echo")
        writer.write(b"ping")
        assert await reader.read() == b.peer_id.encode() + b"ping"
        writer.close()
        for protocol in ("nothing", RELAY):
            with pytest.raises(SwarmUnreachable, match=f"does not serve {protocol}"):
                await b.open_stream(a.peer_id, protocol)
        pids = [a.daemon.pid, b.daemon.pid]
        assert not list(a.daemon.folder.glob("*key*"))  # the daemon has read it
        await a.close()
        await a.close()
        await b.close()
        return pids

    pids = asyncio.run(body())
    assert all(is_gone(pid) for pid in pids)


@swarm
def test_every_address_says_why_it_failed(tmp_path: Path) -> None:
    async def body() -> str:
        a, b = await start(tmp_path, "a"), await start(tmp_path, "b")
        other = peer_id_of(new_key().public_key())
        try:
            with pytest.raises(SwarmUnreachable) as caught:
                await b.dial(other, ["/ip4/127.0.0.1/tcp/1", f"/ip4/127.0.0.1/tcp/{a.port}"], 5)
        finally:
            await a.close()
            await b.close()
        return str(caught.value).replace(a.peer_id, "THE-OTHER")

    text = asyncio.run(body())
    assert "/ip4/127.0.0.1/tcp/1: connection refused" in text
    assert "another peer answers there (THE-OTHER)" in text


@swarm
class Gate:
    """A TCP proxy: it passes connections on while it `is_open`, else it accepts and closes them."""

    def __init__(self, target_port: int) -> None:
        self.target_port, self.is_open, self.accepted = target_port, False, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if not self.is_open:
            writer.close()
            return
        inner, outer = await asyncio.open_connection("127.0.0.1", self.target_port)
        await asyncio.gather(_pipe(reader, outer), _pipe(inner, writer))


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


def test_behind_a_proxy_that_accepts_and_closes_a_peer_is_reached_as_soon_as_it_is_there() -> None:
    """libp2p alone waits for 5 s after the first failure, and longer and longer after the next ones."""

    async def run() -> None:
        target, node = await start_p2p(new_key()), await start_p2p(new_key())
        gate = Gate(target.port)
        proxy = await asyncio.start_server(gate.serve, "127.0.0.1", 0)
        address = f"/ip4/127.0.0.1/tcp/{proxy.sockets[0].getsockname()[1]}"
        try:
            for _ in range(4):
                with pytest.raises(SwarmUnreachable, match="accepted and closed at once, as by a proxy"):
                    await node.dial(target.peer_id, [address], 5)
                await asyncio.sleep(0.2)
            gate.is_open = True
            await node.dial(target.peer_id, [address], 5)
        finally:
            await node.close()
            await target.close()
            proxy.close()

    asyncio.run(run())


def test_a_taken_port_is_an_error_and_a_freed_one_is_not(tmp_path: Path) -> None:
    async def body() -> None:
        a = await start(tmp_path, "a")
        with pytest.raises(ConfigError, match=f"port {a.port} is taken"):
            await start(tmp_path, "b", port=a.port)
        await a.close()
        again = await start(tmp_path, "a", port=a.port)
        assert (again.port, again.peer_id) == (a.port, a.peer_id)
        await again.close()

    asyncio.run(body())


@swarm
def test_the_daemons_death_is_noticed(tmp_path: Path) -> None:
    async def body() -> None:
        a, b = await start(tmp_path, "a"), await start(tmp_path, "b")
        os.kill(a.daemon.pid, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            await a.died.wait()
        with pytest.raises(SwarmUnreachable, match="p2pd"):
            await a.dial(b.peer_id, b.addresses, 5)
        await a.close()
        await b.close()

    asyncio.run(body())


_CHILD = """
import asyncio, sys
from pathlib import Path
from thinwire.coordinator.protocol.identity import load_or_create
from thinwire.coordinator.protocol.p2p import start_p2p

async def main():
    host = await start_p2p(load_or_create(Path(sys.argv[1])))
    try:
        print(host.daemon.pid, host.daemon.folder, flush=True)
        if sys.argv[2] == "raise":
            raise RuntimeError("an accident")
        await asyncio.sleep(60)
    finally:
        if sys.argv[2] != "careless":
            await host.close()

asyncio.run(main())
"""


@swarm
@pytest.mark.parametrize(
    ("mode", "signal_number"),
    [("sleep", signal.SIGKILL), ("careless", signal.SIGINT), ("sleep", signal.SIGINT), ("raise", None)],
)
def test_nothing_is_left_of_a_process_that_ends(
    tmp_path: Path, mode: str, signal_number: signal.Signals | None
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path / "id"), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    daemon_pid, folder = child.stdout.readline().split()
    if signal_number is not None:
        child.send_signal(signal_number)
    child.communicate(timeout=20)
    assert eventually(lambda: is_gone(int(daemon_pid)))
    assert eventually(lambda: not Path(folder).exists())


@swarm
def test_folders_that_nobody_holds_are_removed_by_the_next_start(tmp_path: Path) -> None:
    stale = Path(tempfile.mkdtemp(prefix="thinwire-p2p-"))
    (stale / "p2pd.sock").touch()
    os.utime(stale, (0, 0))

    async def body() -> None:
        held = await start(tmp_path, "held")
        os.utime(held.daemon.folder, (0, 0))
        other = await start(tmp_path, "other")
        assert held.daemon.folder.exists()
        await other.close()
        await held.close()

    asyncio.run(body())
    assert not stale.exists()


def test_addresses() -> None:
    assert listen_address("127.0.0.1", 0) == "/ip4/127.0.0.1/tcp/0"
    assert listen_address("::", 7) == "/ip6/::/tcp/7"
    for host, port in (("localhost", 1), ("", 1), ("127.0.0.1", 65536)):
        with pytest.raises(ConfigError):
            listen_address(host, port)
    assert announced("example.org", 7) == "/dns/example.org/tcp/7"
    assert announced("192.0.2.1:9", 7) == "/ip4/192.0.2.1/tcp/9"
    assert announced("[2001:db8::1]:9", 7) == "/ip6/2001:db8::1/tcp/9"
    assert announced("/dns4/example.org/tcp/9/p2p/12D3", 7) == "/dns4/example.org/tcp/9"
    for text in ("", "host:", "host:x", "host:0", ":9"):
        with pytest.raises(ConfigError):
            announced(text, 7)


def test_where_this_machine_is_dialled() -> None:
    assert dialable("127.0.0.1", 7, []) == ("/ip4/127.0.0.1/tcp/7",)
    everywhere = dialable("0.0.0.0", 7, ["example.org:8"])
    assert everywhere[0] == "/dns/example.org/tcp/8"
    assert everywhere[-1] == "/ip4/127.0.0.1/tcp/7"
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        require_free("192.0.2.1", 0)
