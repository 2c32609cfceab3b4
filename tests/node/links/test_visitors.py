"""Streams that others open to a node: strangers have a few for a moment, and nobody takes all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from thinwire.coordinator.protocol.blob_streams import NotServed, get_blob
from thinwire.coordinator.protocol.messages import MAX_PEERS, BadMessage, Member, Members, digest_of
from thinwire.coordinator.protocol.streams import Meter, Stream
from thinwire.node.links import visitors
from thinwire.node.links.blob_server import BlobServer
from thinwire.node.links.members import MemberList
from thinwire.node.links.payloads import PayloadCache, Served
from thinwire.node.links.visitors import MAX_STRANGE

BLOB = bytes(100)
DIGEST = digest_of(BLOB)


class Node:
    """Its blob server, and the ends of those who came. A new MemberList has the `members`."""

    def __init__(self, stack: AsyncExitStack, *members: str) -> None:
        kept = PayloadCache()
        kept.add(1, DIGEST, BLOB)
        self.members = MemberList()
        self.members.update(dict.fromkeys(members, ("/ip4/192.0.2.1/tcp/1",)))
        self.server = BlobServer(Served(kept), self.members, Meter(), None)
        self._stack = stack

    async def visit(self, peer: str) -> Stream:
        ours, theirs = [await asyncio.open_unix_connection(sock=sock) for sock in socket.socketpair()]
        stream = Stream(*ours, Meter())

        async def serve() -> None:
            try:
                await self.server.serve(peer, *theirs)
            finally:
                theirs[1].close()

        self._stack.push_async_callback(asyncio.gather, asyncio.create_task(serve()), return_exceptions=True)
        self._stack.callback(stream.abort)
        await asyncio.sleep(0)
        return stream

    @property
    def n_streams(self) -> int:
        return self.server.visitors.n_streams


def in_a_loop(body: Callable[[AsyncExitStack], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20), AsyncExitStack() as stack:
            await body(stack)

    asyncio.run(run())


def test_strangers_that_say_nothing_hold_few_streams_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(visitors, "STRANGE_S", 0.5)

    async def body(stack: AsyncExitStack) -> None:
        node = Node(stack, "member")
        silent = [await node.visit("stranger 0")]
        node.members.update({"member": (), "stranger 0": ()})  # the list that it is on has come
        silent += [await node.visit(f"stranger {i}") for i in range(1, MAX_STRANGE + 20)]
        assert node.n_streams == MAX_STRANGE
        assert await get_blob(await node.visit("member"), DIGEST, 100, "payload") == BLOB
        for stream in silent[1:]:
            await stream.ended(5.0)
        assert node.n_streams == 2
        assert await get_blob(silent[0], DIGEST, 100, "payload") == BLOB
        with pytest.raises(NotServed, match="only members"):
            await get_blob(await node.visit("stranger 1"), DIGEST, 100, "payload")

    in_a_loop(body)


def test_members_that_open_many_give_one_up_for_who_comes_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "MAX_STREAMS", 12)

    async def body(stack: AsyncExitStack) -> None:
        node = Node(stack, "greedy", "few", "new")
        greedy = [await node.visit("greedy") for _ in range(8)]
        few = [await node.visit("few") for _ in range(4)]
        await (await node.visit("greedy")).ended(5.0)  # more than a peer may have
        assert await get_blob(await node.visit("new"), DIGEST, 100, "payload") == BLOB
        await greedy[0].ended(5.0)
        assert node.n_streams == 12
        for stream in (*greedy[1:], *few):
            assert await get_blob(stream, DIGEST, 100, "payload") == BLOB

    in_a_loop(body)


def test_changes_of_the_list_of_members_may_say_anything_and_make_no_endless_one() -> None:
    def said(first: int, n: int, left: tuple[str, ...] = ()) -> Members:
        here = tuple(Member(peer_id=f"peer{i}", addresses=()) for i in range(first, first + n))
        return Members(members=here, left=left, is_change=True)

    members = MemberList()
    members.heard(said(0, 2, ("a stranger", "peer0")))  # before the whole list, of whoever is not on it
    assert members.connected() == ["peer0", "peer1"]
    members.heard(said(0, MAX_PEERS))
    members.heard(said(MAX_PEERS, MAX_PEERS))
    with pytest.raises(BadMessage, match="2049 members, at most 1024"):
        members.heard(said(2 * MAX_PEERS, 1))
    members.heard(said(2 * MAX_PEERS, 1, ("peer7",)))
    assert len(members.connected()) == 2 * MAX_PEERS
    assert "peer7" not in members.connected()
