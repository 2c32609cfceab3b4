"""The coordinator's end of one node's session: what waits to be sent, and the commits that it follows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from .protocol.messages import Commit, Elsewhere, Heartbeat, Members, Message, Notice, Offered, Refused
from .protocol.streams import Stream

MAX_QUEUED = 256
"""Messages that wait for a slow node; commits wait in the ledger."""

MAX_QUEUED_HINTS = 128
"""Beyond this many messages nobody is told any more who has which payload: the coordinator has them all."""

COMMITS_AT_ONCE = 16
_LAST_COUNTS = (Members, Notice, Heartbeat)
"""Of these only the newest one matters to a node that has fallen behind."""


class Session:
    """One open session. Belongs to the event loop; `number` grows with every session of the process."""

    def __init__(self, peer_id: str, number: int, stream: Stream) -> None:
        self.peer_id, self.number, self.stream = peer_id, number, stream
        self._queue: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._follows: int | None = None
        self._is_idle = False
        """`write` waits for something to send."""
        self.is_ending = False

    def post(self, message: Message) -> bool:
        """Sends a message where nothing waits, else queues it; False: the node takes too little, the session
        is to be closed."""
        if self._sends_now(message):
            return True
        if isinstance(message, _LAST_COUNTS):
            old = next((m for m in self._queue if type(m) is type(message)), None)
            if old is not None:
                self._queue.remove(old)
            if isinstance(message, Members) and isinstance(old, Members):
                message = old.then(message)
        if isinstance(message, Offered) and len(self._queue) >= MAX_QUEUED_HINTS:
            return True
        self._queue.append(message)
        self._wake.set()
        return len(self._queue) <= MAX_QUEUED

    def follow(self, after: int) -> None:
        """From now on the node gets the commits after this round."""
        self._follows = after
        self._wake.set()

    def committed(self, round_: int, commit: Commit) -> None:
        """There is a new commit, of that round."""
        if self._follows == round_ - 1 and self._sends_now(commit):
            self._follows = round_
        else:
            self._wake.set()

    def wake(self) -> None:
        """There may be new commits."""
        self._wake.set()

    def _sends_now(self, message: Message) -> bool:
        is_free = self._is_idle and not self._queue and not self.is_ending and not self._wake.is_set()
        return is_free and self.stream.send_now(message)

    def end(self, why: Refused | Elsewhere | None = None) -> None:
        """Sends what is queued, then the reason; `write` returns then. The first reason stands."""
        if why is not None and not self.is_ending:
            self._queue.append(why)
        self.is_ending = True
        self._wake.set()

    async def write(self, commits: Callable[[int, int], list[Commit]]) -> None:
        """Sends until the session ends; a slow node holds up only this. Raises OSError."""
        while True:
            self._wake.clear()
            while self._queue:
                await self.stream.send_message(self._queue.popleft())
            if self.is_ending:
                return
            if not await self._send_commits(commits):
                self._is_idle = True
                await self._wake.wait()
                self._is_idle = False

    async def _send_commits(self, commits: Callable[[int, int], list[Commit]]) -> bool:
        """One batch; False: the node has all there are."""
        if self._follows is None:
            return False
        start = self._follows
        batch = commits(start, COMMITS_AT_ONCE)
        for n, commit in enumerate(batch, 1):
            await self.stream.send_message(commit)
            if self._follows != start + n - 1:  # it asked to follow from elsewhere meanwhile
                return True
            self._follows = start + n
            if self._queue:
                return True
        return bool(batch)
