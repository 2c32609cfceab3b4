"""Peers that cannot reach each other exchange by way of a member that both reach: streams in one loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.committee import KEYS
from tests.support.loop_transport import LoopTransport, Network
from thinwire.coordinator.protocol.streams import GOSSIP, FrameKind, Meter, Stream
from thinwire.node.gossip.base import EdgeBytes
from thinwire.node.gossip.carrying import Signer
from thinwire.node.gossip.streams import NeighbourStreams
from thinwire.node.gossip.transfer import Head, put
from thinwire.node.links.members import MemberList

RUN = b"r" * 32
WAIT_S = 10.0
PLACE = ("/ip4/127.0.0.1/tcp/1",)


@dataclass
class Node:
    transport: LoopTransport
    signer: Signer
    streams: NeighbourStreams
    members: MemberList

    @property
    def name(self) -> str:
        return self.transport.peer_id

    async def stream_to(self, peer: str) -> Stream:
        return Stream(*await self.transport.open_stream(peer, GOSSIP), Meter())


async def node_of(network: Network, key: Ed25519PrivateKey) -> Node:
    transport = await network.start(key)
    members, signer = MemberList(), Signer(transport.peer_id, RUN, key)

    async def open_stream(peer: str) -> Stream:
        return Stream(*await transport.open_stream(peer, GOSSIP), Meter())

    streams = NeighbourStreams(open_stream, members, signer, Meter(), None)
    streams.inbox.max_bytes = 2**20
    await transport.handle(GOSSIP, streams.serve)
    return Node(transport, signer, streams, members)


@asynccontextmanager
async def nodes(n: int) -> AsyncIterator[tuple[Network, list[Node]]]:
    """All are members, and in round 1."""
    network = Network()
    found = [await node_of(network, key) for key in KEYS[:n]]
    for node in found:
        node.members.update({other.name: PLACE for other in found})
        node.streams.send(1, [], b"nothing yet")
    try:
        yield network, found
    finally:
        for node in found:
            node.streams.close()
            await node.transport.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


Scene = Callable[[Network, list[Node]], Awaitable[None]]


def play(n: int, scene: Scene) -> None:
    async def whole() -> None:
        async with asyncio.timeout(30), nodes(n) as (network, found):
            await scene(network, found)

    asyncio.run(whole())


async def exchange(round_: int, *pair: Node) -> list[list[tuple[str, bytes]]]:
    names = [node.name for node in pair]
    for node in pair:
        others = [name for name in names if name != node.name]
        node.streams.send(round_, others, f"{node.name} in {round_}".encode() * 5000)
    return [await node.streams.received(round_, names, WAIT_S) for node in pair]


def test_a_member_that_both_reach_carries_and_is_counted_apart() -> None:
    async def scene(network: Network, found: list[Node]) -> None:
        a, b, c = found
        network.cut_pair(a.name, b.name)
        for round_ in (1, 2):
            from_b, from_a = await exchange(round_, a, b)
            assert from_b == [(b.name, f"{b.name} in {round_}".encode() * 5000)]
            assert from_a == [(a.name, f"{a.name} in {round_}".encode() * 5000)]
        n = 2 * len(from_a[0][1])
        for node, other in ((a, b), (b, a)):
            await until(
                lambda node=node, other=other: node.streams.edges == {other.name: EdgeBytes(n, n, 2 * n)}
            )
        assert c.streams.edges == {}
        assert c.streams.carrying.n_bytes == 2 * n

    play(3, scene)


def test_without_such_a_member_nobody_waits() -> None:
    async def scene(network: Network, found: list[Node]) -> None:
        a, b, c = found
        network.cut_pair(a.name, b.name)
        network.cut_pair(c.name, b.name)
        a.streams.send(1, [b.name], b"a's")
        assert await a.streams.received(1, [b.name], 60.0) == []

    play(3, scene)


def test_who_is_reached_again_is_sent_to_itself() -> None:
    """It has dialled: its own stream says so at once."""

    async def scene(network: Network, found: list[Node]) -> None:
        a, b, _ = found
        network.cut_pair(a.name, b.name)
        await exchange(1, a, b)
        network.mend()
        (await b.stream_to(a.name)).abort()
        await until(lambda: not a.streams.carrying.routes.is_cut_off(b.name))
        await exchange(2, a, b)
        await until(lambda: not b.streams.carrying.routes.is_cut_off(a.name))
        before = a.streams.edges[b.name]
        await exchange(3, a, b)
        await until(lambda: a.streams.edges[b.name].sent > before.sent)
        assert a.streams.edges[b.name].relayed == before.relayed

    play(3, scene)


def test_what_a_member_will_not_carry() -> None:
    async def scene(network: Network, found: list[Node]) -> None:
        a, b, c, d = found

        async def asked(to: str, round_: int, n_bytes: int) -> bool:
            data = bytes(n_bytes)
            signature = a.signer.signature(to, round_, data)
            stream = await a.stream_to(c.name)
            try:
                return await put(stream, FrameKind.CARRY, Head(round_, n_bytes, signature, to), data)
            finally:
                stream.abort()

        assert await asked(b.name, 1, 10)
        assert not await asked(b.name, 1, 10)  # the same again
        assert not await asked(b.name, 4, 10)  # another time's
        assert not await asked(b.name, 2, 2**20 + 1)
        assert not await asked("nobody", 2, 10)
        for round_ in (2, 3):  # it never sends what it has announced
            await (await a.stream_to(c.name)).send(
                FrameKind.CARRY, Head(round_, 10, bytes(64), b.name).packed()
            )
        await until(lambda: c.streams.carrying.n_under_way == 2)
        assert not await asked(d.name, 1, 10)
        assert c.streams.inbox.rejected == dict.fromkeys(("again", "round", "size", "stranger", "busy"), 1)
        assert c.streams.carrying.n_bytes == 10

    play(4, scene)


@pytest.mark.parametrize("forged", ["other round", "other sender", "other words", "nothing"])
def test_the_member_that_carries_cannot_speak_for_others(forged: str) -> None:
    async def scene(network: Network, found: list[Node]) -> None:
        a, b, c = found
        b.streams.send(1, [a.name], b"b's")
        said = b"words"
        sender = {"other sender": c}.get(forged, a)
        signature = sender.signer.signature(b.name, 2 if forged == "other round" else 1, said)
        if forged == "nothing":
            signature = bytes(64)
        if forged == "other words":
            said = b"sword"
        stream = await c.stream_to(b.name)
        assert not await put(stream, FrameKind.CARRIED, Head(1, len(said), signature, a.name), said)
        assert b.streams.inbox.rejected == {"signature": 1}
        right = a.signer.signature(b.name, 1, b"words")
        assert await put(stream, FrameKind.CARRIED, Head(1, 5, right, a.name), b"words")
        assert await b.streams.received(1, [a.name], WAIT_S) == [(a.name, b"words")]
        stream.abort()

    play(3, scene)
