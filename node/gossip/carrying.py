"""Messages between peers that cannot reach each other, by way of a member that both reach. One event loop.

The sender asks a member to carry; which one is drawn by the two names, so that both try the same ones first
and whoever cannot be dialled has dialled it. It takes no byte before the other end wants the message, passes
it on chunk by chunk, keeps nothing, and counts what it carries: few at a time, one of each sender for each
peer and round. The receiver believes the sender's signature, never the member.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import msgpack
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.messages import BadMessage, digest_of
from ...coordinator.protocol.streams import FrameKind, Stream
from ...coordinator.protocol.trust.signatures import NOT_SIGNED, key_of, verifies
from ..links.members import MemberList
from .inbox import Inbox, Rejection
from .transfer import GO, TAKEN, Head, hear, pass_on, put, say

_WHAT: Final = b"thinwire neighbour\n"
_TRIED: Final = 3
"""Members that are asked to carry a message."""

_RETRY_S: Final = 60.0
"""Between two attempts to reach a peer that could not be reached."""

_AT_ONCE: Final = 8
_AT_ONCE_OF_ONE: Final = 2
"""Messages that this node carries, and of them from one sender, or to one peer."""

_MOST_APART: Final = 2
"""Rounds between this node's exchange and one that it carries for."""

_REMEMBERED: Final = 4096

BROKEN: Final = (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError)
"""What ends a stream."""

OpenStream = Callable[[str], Awaitable[Stream]]
"""To a member. Raises SwarmUnreachable."""


@dataclass(frozen=True, slots=True)
class Signer:
    """This node, and the run that it signs for. `key`: None, peer ids are only names here."""

    me: str
    run_id: bytes = b""
    key: Ed25519PrivateKey | None = None

    def signature(self, to: str, round_: int, data: bytes) -> bytes:
        return NOT_SIGNED if self.key is None else self.key.sign(self._claim(self.me, to, round_, data))

    def is_from(self, sender: str, signature: bytes, round_: int, data: bytes) -> bool:
        """Whether that peer has signed this message to this node; one without a key need not."""
        key = key_of(sender)
        return key is None or verifies(key, signature, self._claim(sender, self.me, round_, data))

    def _claim(self, sender: str, to: str, round_: int, data: bytes) -> bytes:
        said: bytes = msgpack.packb([round_, sender, to, digest_of(data)])
        return _WHAT + self.run_id + said


class Routes:
    """Whom this node cannot reach, and who carries to them."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._tried_s: dict[str, float] = {}
        self._carriers: dict[str, str] = {}

    def is_cut_off(self, peer: str) -> bool:
        return peer in self._tried_s

    def is_time_to_try(self, peer: str) -> bool:
        return time.monotonic() - self._tried_s.get(peer, 0.0) >= _RETRY_S

    def tried(self, peer: str, *, reached: bool) -> None:
        if reached:
            self._tried_s.pop(peer, None)
        else:
            self._tried_s[peer] = time.monotonic()

    def carriers(self, peer: str, members: list[str]) -> list[str]:
        """Members to be asked, in order: who did it last, then as drawn by the two names."""
        pair = "\n".join(sorted((self._me, peer))).encode()
        others = [member for member in members if member not in (self._me, peer)]
        others.sort(key=lambda m: (m != self._carriers.get(peer), blake3(pair + m.encode()).digest(8)))
        return others[:_TRIED]

    def carried(self, peer: str, by: str) -> None:
        self._carriers[peer] = by


class Carrying:
    """`inbox`: knows this node's round, what a message may have, and counts refusals. `n_bytes`: that this
    node has carried for others."""

    def __init__(self, open_stream: OpenStream, members: MemberList, inbox: Inbox, signer: Signer) -> None:
        self._open_stream, self._members, self._inbox, self._signer = open_stream, members, inbox, signer
        self.routes = Routes(signer.me)
        self.n_bytes = 0
        self._under_way: Counter[tuple[str, str]] = Counter()
        self._newest: dict[tuple[str, str], int] = {}
        """The last round of a sender's messages to a peer that were carried."""

    @property
    def n_under_way(self) -> int:
        """Messages that it carries now."""
        return self._under_way.total()

    async def send(self, peer: str, round_: int, data: bytes) -> None:
        """By way of a member. Raises SwarmUnreachable: none could."""
        head = Head(round_, len(data), self._signer.signature(peer, round_, data), peer)
        for member in self.routes.carriers(peer, self._members.connected()):
            with contextlib.suppress(*BROKEN):
                async with self._stream_to(member) as stream:
                    if await put(stream, FrameKind.CARRY, head, data):
                        self.routes.carried(peer, member)
                        return
        raise SwarmUnreachable(f"{peer} is not reached, and no member carries to it")

    async def carry(self, sender: str, stream: Stream, head: Head) -> None:
        """What a sender asks for. Raises what ends its stream."""
        refusal = self._refusal(sender, head)
        if refusal is not None:
            self._inbox.rejected[refusal] += 1
            await say(stream, FrameKind.NO, refusal.encode())
            return
        both = sender, head.other
        self._under_way[both] += 1
        try:
            is_there = await self._carry(sender, stream, head)
        finally:
            self._under_way -= Counter((both,))
        await say(stream, FrameKind.DONE if is_there else FrameKind.NO)

    async def _carry(self, sender: str, stream: Stream, head: Head) -> bool:
        """Whether the other end has it."""
        try:
            async with self._stream_to(head.other) as onward:
                await say(onward, FrameKind.CARRIED, replace(head, other=sender).packed())
                if await hear(onward, GO) is FrameKind.NO:
                    return False
                if len(self._newest) >= _REMEMBERED:
                    self._newest.clear()
                self._newest[sender, head.other] = head.round
                await say(stream, FrameKind.GO)
                await pass_on(stream, onward, head.n_bytes)
                self.n_bytes += head.n_bytes
                return await hear(onward, TAKEN) is FrameKind.DONE
        except SwarmUnreachable:
            self.routes.tried(head.other, reached=False)
            return False

    def _refusal(self, sender: str, head: Head) -> Rejection | None:
        if sender not in self._members or head.other not in self._members.connected():
            return "stranger"
        if abs(head.round - self._inbox.round) > _MOST_APART:
            return "round"
        if not 0 < head.n_bytes <= self._inbox.max_bytes:
            return "size"
        if self.routes.is_cut_off(head.other) and not self.routes.is_time_to_try(head.other):
            return "cut_off"
        if head.round <= self._newest.get((sender, head.other), 0):
            return "again"
        ways = list(self._under_way.elements())
        of_one = max(sum(way[0] == sender for way in ways), sum(way[1] == head.other for way in ways))
        return "busy" if len(ways) >= _AT_ONCE or of_one >= _AT_ONCE_OF_ONE else None

    @asynccontextmanager
    async def _stream_to(self, peer: str) -> AsyncIterator[Stream]:
        """Of its own. Raises SwarmUnreachable."""
        stream = await self._open_stream(peer)
        try:
            yield stream
        finally:
            stream.abort()
