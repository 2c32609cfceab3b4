"""What the daemon is told and what it says, byte by byte: against hivemind's own reading of addresses."""

from __future__ import annotations

import asyncio
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from thinwire.coordinator.protocol.libp2p.wire import (
    Answer,
    BadWords,
    Incoming,
    Kind,
    connect,
    disconnect,
    framed,
    packed,
    read_framed,
    stream_handler,
    tcp_port,
)

PEER = "12D3KooWRVWNVmWT6Bj6U2HHP3p7cyKwTyaehzt5AbfEXyRPDQco"
RSA = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.fixture(scope="module")
def multiaddr() -> ModuleType:
    """hivemind's package of that name, without the rest of it."""
    return _of_hivemind("its_multiaddr", "utils/multiaddr/__init__.py")


def _of_hivemind(name: str, path: str) -> ModuleType:
    hivemind = find_spec("hivemind")
    assert hivemind is not None
    assert hivemind.submodule_search_locations is not None
    spec = spec_from_file_location(name, Path(hivemind.submodule_search_locations[0]) / path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.0.2.1/tcp/4001",
        "/ip6/2001:db8::1/tcp/65535",
        "/dns/example.org/tcp/1",
        "/dns4/example.org/tcp/9",
        "/dns6/example.org/udp/9/quic",
        "/ip4/192.0.2.1/tcp/4001/p2p-circuit",
        "/unix/tmp/thinwire/p2pd.sock",
    ],
)
def test_addresses_are_written_as_hivemind_writes_them(multiaddr: ModuleType, address: str) -> None:
    assert packed(address) == multiaddr.Multiaddr(address).to_bytes()


@pytest.mark.parametrize(
    "address",
    ["", "/", "x", "/ip4", "/ip4/example.org/tcp/1", "/ip4/1.2.3.4/tcp/65536", "/ip4/1.2.3.4/xyz/1"],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(BadWords):
        packed(address)


def test_requests_are_as_the_daemon_s_definition_has_them() -> None:
    peer, address = packed(f"/p2p/{PEER}")[2:], packed("/ip4/192.0.2.1/tcp/4001")
    body = b"\x0a" + peer + b"\x12" + framed(address)
    assert connect(PEER, ["/ip4/192.0.2.1/tcp/4001"]) == b"\x08\x01\x12" + framed(body)
    socket = packed("/unix/a")
    assert stream_handler("/a", "x") == b"\x08\x03\x22" + framed(
        b"\x0a" + framed(socket) + b"\x12\x01x\x18\x00"
    )


def test_requests_have_the_numbers_of_the_daemon_s_definition() -> None:
    """The daemon answers one that it does not know as if it had done it."""
    theirs = dict(_of_hivemind("its_p2pd_pb2", "proto/p2pd_pb2.py").Request.Type.items())
    ours = {kind.name: kind.value for kind in Kind if kind is not Kind.STAY}
    assert ours == {name: theirs[name] for name in ours}
    assert theirs["PERSISTENT_CONN_UPGRADE"] == Kind.STAY
    assert disconnect(PEER) == b"\x08\x07\x3a" + framed(b"\x0a" + packed(f"/p2p/{PEER}")[2:])


def test_answers_are_read_and_what_is_none_is_refused() -> None:
    assert Answer.parse(b"\x08\x00") == Answer()
    assert Answer.parse(b"\x08\x01\x12\x04\x0a\x02no").error == "no"
    own = b"\x0a\x01p" + b"\x12" + framed(packed("/ip4/127.0.0.1/tcp/7"))
    (listens,) = Answer.parse(b"\x08\x00\x22" + framed(own)).addresses
    assert tcp_port(listens) == 7
    assert tcp_port(packed("/dns/example.org/tcp/7")) is None
    stream = b"\x0a" + framed(packed(f"/p2p/{RSA}")[3:]) + b"\x12\x00\x1a\x04what"
    assert Incoming.parse(stream) == Incoming(RSA, "what")
    for data in (b"\x08", b"\x12\x05no", b"\x0d\x00", b"\xff" * 12):
        with pytest.raises(BadWords):
            Answer.parse(data)


def test_a_message_that_is_too_long_is_not_waited_for() -> None:
    async def body() -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(framed(b"x" * 300) + b"\xff\xff\xff\x7f")
        first = await read_framed(reader)
        with pytest.raises(BadWords, match="too long"):
            await read_framed(reader)
        return first

    assert asyncio.run(body()) == b"x" * 300
