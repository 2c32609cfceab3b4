"""A coordinator that was restored from an older copy gets its commits back from a node that has them.

Hello with a head beyond ours -> Follow(after = our head) -> Commit ..., up to that head -> Welcome
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ..compression.errors import SwarmUnreachable
from .protocol.messages import Commit, Follow, Hello
from .protocol.streams import COMMITS_FROM_NODE, BadFrame, Stream

STALL_S = 10.0
"""A node that sends nothing for this long is not waited for any longer."""

COMMIT_S = 120.0
"""Nor one that takes longer for one commit: meanwhile no round closes."""

IN_VAIN = 0.05
"""Of the time, at most, no round closes for a peer that gives nothing."""

_AT_ONCE = 64
_BYTES_AT_ONCE = 16 * 2**20


class Adopter(Protocol):
    """A service, or a seat that waits for lost records: see the methods of `Service`."""

    @property
    def head(self) -> int: ...
    def hold(self) -> None: ...
    def adopt(self, commits: Sequence[Commit]) -> None: ...
    def go_on(self, now_s: float) -> None: ...


class Claims:
    """Of those who say that they have lost commits. For whom rounds have waited in vain, beyond `free_s`, is
    not asked again until that was `IN_VAIN` of the time."""

    def __init__(self, free_s: float) -> None:
        self._free_s = free_s
        self._paid_s: dict[str, float] = {}
        """When all is made up for."""

    def check(self, who: str, now_s: float) -> None:
        """Raises SwarmUnreachable."""
        wait_s = self._paid_s.get(who, now_s) - now_s - self._free_s / IN_VAIN
        if wait_s > 0:
            raise SwarmUnreachable(
                "commits that are missing here were announced before, and did not come: they are asked for "
                f"again in {wait_s:.0f} s"
            )

    def was_in_vain(self, who: str, took_s: float, now_s: float) -> None:
        """Rounds waited for so long, and nothing came."""
        self._paid_s = {peer: paid_s for peer, paid_s in self._paid_s.items() if paid_s > now_s}
        self._paid_s[who] = max(now_s, self._paid_s.get(who, now_s)) + took_s / IN_VAIN


async def adopt(
    service: Adopter, stream: Stream, hello: Hello, adopted: Callable[[], None], stall_s: float = STALL_S
) -> None:
    """Returns when the service has what the node said that it has. One adoption at a time.

    `adopted` is called after every batch: sessions that are open are over. What came before a break stays.
    Raises LedgerCorrupt (a fork), BadMessage, SwarmUnreachable (stalled), EOFError or OSError.
    """
    service.hold()
    try:
        await stream.send_message(Follow(after=service.head))
        at_most = 1  # the first one proves that there is something to be had
        while hello.is_ahead_of(service.head):
            n = min(at_most, (hello.head_round or 0) - service.head)
            service.adopt(await _commits(stream, n, stall_s))
            adopted()
            at_most = min(2 * at_most, _AT_ONCE)
    finally:
        service.go_on(time.monotonic())


async def _commits(stream: Stream, at_most: int, stall_s: float) -> list[Commit]:
    """The next commits, for one write to the disk."""
    commits: list[Commit] = []
    n_bytes = 0
    while len(commits) < at_most and n_bytes < _BYTES_AT_ONCE:
        commits.append(await _commit(stream, stall_s))
        n_bytes += len(commits[-1].record)
    return commits


async def _commit(stream: Stream, stall_s: float) -> Commit:
    """A slow one is waited for while bytes keep coming."""
    task = asyncio.create_task(stream.receive_message(COMMITS_FROM_NODE))
    began_s = stream.heard_s = time.monotonic()
    try:
        while not task.done():
            if time.monotonic() > min(stream.heard_s + stall_s, began_s + COMMIT_S):
                raise SwarmUnreachable("the node has stopped to give commits back")
            await asyncio.wait({task}, timeout=1.0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    commit = task.result()
    if not isinstance(commit, Commit):
        raise BadFrame("adopt", f"a Commit is expected, not {type(commit).__name__}")
    return commit
