"""The coordinator's transport in a Ray cluster: calls of node actors become streams to its handlers.

A *line* is one stream; its number is random and made by the node, so that a restarted coordinator knows none
of the old ones. Blobs are references: those that nodes have put are handed on as long as somebody asks for
them, and are freed a little later; what is on the coordinator's disk is put into its own object store when it
is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.blob_streams import NotServed, put_blob
from ...coordinator.protocol.messages import BadMessage
from ...coordinator.protocol.streams import BLOB, SESSION, Meter, Stream
from ...coordinator.protocol.transport import StreamHandler
from .transport import NO_SESSION, PIECE_BYTES, Ends, ask_handler, run_handler, stream_pair

POLL_S: Final = 5.0
"""A call that waits for something returns after so long, so that it is seen to be alive."""

UNCONNECTED_S: Final = 30.0
ANSWER_S: Final = 15.0
"""A holder that does not say whether it has a blob for this long is not waited for."""

KEPT_S: Final = 20.0
KEPT_BYTES: Final = 2**30
"""References to blobs are kept for so long after they were last asked for, and for at most so many bytes."""


@dataclass(slots=True)
class _Line:
    """`over` is set when it has ended, for whatever reason."""

    peer_id: str | None = None
    ends: Ends | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    wanted: deque[tuple[int, str, bytes]] = field(default_factory=deque)
    is_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    asked: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _KeptBlob:
    holder: str | None
    ref: Any
    n_bytes: int
    used_s: float


Found = tuple[list[Any], str]
"""A reference in a list, so that Ray does not resolve it; or none, and why."""


class RayCoordinatorTransport:
    """See `Transport`. `is_member`: whether a peer may have blobs. Belongs to the actor's event loop."""

    port = 0

    def __init__(self, peer_id: str, address: str, is_member: Callable[[str], bool]) -> None:
        self._peer_id, self._is_member = peer_id, is_member
        self.addresses: tuple[str, ...] = (address,)
        self.died = asyncio.Event()
        self._handlers: dict[str, StreamHandler] = {}
        self._lines: dict[bytes, _Line] = {}
        self._sessions: dict[str, bytes] = {}
        self._kept: dict[tuple[bytes, str | None], _KeptBlob] = {}
        self._asked: dict[int, asyncio.Future[Found]] = {}
        self._numbers = count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        raise SwarmUnreachable("the coordinator calls nobody")

    async def open_stream(self, peer_id: str, protocol: str, timeout_s: float) -> Ends:
        raise SwarmUnreachable("the coordinator calls nobody")

    async def disconnect(self, peer_id: str) -> None:
        if peer_id in self._sessions:
            self._end(self._sessions[peer_id])

    async def close(self) -> None:
        for line in list(self._lines):
            self._end(line)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._kept.clear()

    # ------------------------------------------------------------------------------------------- lines

    async def attend(self, line: bytes) -> None:
        """Returns when the line has ended, or was not connected in time; see `RayNodeTransport`."""
        entry = self._line(line)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UNCONNECTED_S):
                while entry.ends is None and not entry.over.is_set():
                    await asyncio.sleep(0.1)
        if entry.ends is None:
            self._end(line)
        await entry.over.wait()

    async def connect(self, line: bytes, peer_id: str, protocol: str, life: list[Any]) -> bool:
        """Hands the line to the handler of its protocol; False: there is none.

        `life`: the node's reference to the result of `attend`, in a list so that it stays a reference.
        """
        handler, entry = self._handlers.get(protocol), self._line(line)
        if handler is None or entry.ends is not None:
            self._end(line)
            return False
        entry.peer_id = peer_id
        entry.ends, far = await stream_pair()
        if protocol == SESSION:
            self._sessions[peer_id] = line
        self._start(run_handler(handler, peer_id, *far))
        self._start(self._watch(line, entry, life[0]))
        return True

    async def write(self, line: bytes, data: bytes) -> bool:
        """Bytes from the node; False: the line is over."""
        entry = self._lines.get(line)
        if entry is None or entry.ends is None:
            return False
        _, writer = entry.ends
        try:
            writer.write(data)
            await writer.drain()
        except OSError:
            return False
        return True

    async def read(self, line: bytes) -> bytes | None:
        """Bytes for the node as soon as there are any; empty after POLL_S without. None: the line is over."""
        entry = self._lines.get(line)
        if entry is None or entry.ends is None:
            return None
        reader, _ = entry.ends
        try:
            async with asyncio.timeout(POLL_S):
                data = await reader.read(PIECE_BYTES)
        except TimeoutError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._end(line)
            return None
        return data

    async def hang_up(self, line: bytes) -> None:
        """The node has closed the line."""
        self._end(line)

    async def _watch(self, line: bytes, entry: _Line, life: Any) -> None:
        """Ends the line when its node's process is gone."""
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            await life
        self._end(line)

    def _line(self, line: bytes) -> _Line:
        return self._lines.setdefault(line, _Line())

    def _end(self, line: bytes) -> None:
        entry = self._lines.pop(line, None)
        if entry is None:
            return
        entry.over.set()
        entry.is_wanted.set()
        if entry.peer_id is not None and self._sessions.get(entry.peer_id) == line:
            del self._sessions[entry.peer_id]
        if entry.ends is not None:
            entry.ends[1].close()
        for number in entry.asked:
            self._settle(number, ([], "the holder is gone"))

    # ------------------------------------------------------------------------------------------- blobs

    async def put_blob(self, line: bytes, digest: bytes, refs: list[Any]) -> str | None:
        """Stores what a node has put into its object store; returns why it could not, or None."""
        from ray.exceptions import RayError

        peer_id = self._peer_of(line)
        if peer_id is None:
            return NO_SESSION
        try:
            data = await refs[0]
        except RayError as e:
            return f"the upload was lost: {type(e).__name__}"
        near, far = await stream_pair()
        serving = asyncio.create_task(run_handler(self._handlers[BLOB], peer_id, *far))
        stream = Stream(*near, Meter())
        try:
            await put_blob(stream, digest, data, "payload")
        except NotServed as e:
            return str(e)
        except (OSError, EOFError, BadMessage, SwarmUnreachable) as e:
            return f"the upload broke: {e}"
        finally:
            stream.abort()
            await asyncio.gather(serving, return_exceptions=True)
        self._keep(digest, peer_id, refs[0], len(data))
        return None

    async def get_blob(self, line: bytes, digest: bytes, holder: str | None, is_fresh: bool) -> Found:
        """A reference to the blob, or why there is none. `holder` None: the coordinator; `is_fresh`: the
        object that was given before is lost."""
        asker = self._peer_of(line)
        if asker is None:
            return [], NO_SESSION
        self._forget_old()
        if is_fresh:
            for key in [key for key in self._kept if key[0] == digest]:
                del self._kept[key]
        kept = self._find(digest, holder)
        if kept is not None and self._is_member(asker):
            kept.used_s = time.monotonic()
            return [kept.ref], ""
        return await (self._own(asker, digest) if holder is None else self._ask(holder, asker, digest))

    async def wanted(self, line: bytes) -> list[tuple[int, str, bytes]] | None:
        """Requests to this node for blobs: (number, asker, digest) each, as soon as there are any; empty
        after POLL_S without. None: the line is over."""
        entry = self._lines.get(line)
        if entry is None:
            return None
        if not entry.wanted:
            entry.is_wanted.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await entry.is_wanted.wait()
        if line not in self._lines:
            return None
        found = list(entry.wanted)
        entry.wanted.clear()
        return found

    async def answer(self, number: int, refs: list[Any], why: str) -> None:
        """A node's answer to a request that `wanted` gave it: a reference, or why there is none."""
        self._settle(number, (refs, why))

    async def _own(self, asker: str, digest: bytes) -> Found:
        """From the coordinator's disk, as for a node that asks over a stream."""
        import ray

        found = await ask_handler(self._handlers.get(BLOB), asker, digest)
        if isinstance(found, str):
            return [], found
        ref = await asyncio.to_thread(ray.put, found)
        self._keep(digest, None, ref, len(found))
        return [ref], ""

    async def _ask(self, holder: str, asker: str, digest: bytes) -> Found:
        entry = self._lines.get(self._sessions.get(holder, b""))
        if entry is None:
            return [], f"{holder} is not connected to the swarm"
        number = next(self._numbers)
        answer: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        entry.asked.add(number)
        entry.wanted.append((number, asker, digest))
        entry.is_wanted.set()
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            return [], f"{holder} does not answer"
        finally:
            entry.asked.discard(number)
            self._asked.pop(number, None)

    def _settle(self, number: int, found: Found) -> None:
        asked = self._asked.get(number)
        if asked is not None and not asked.done():
            asked.set_result(found)

    def _find(self, digest: bytes, holder: str | None) -> _KeptBlob | None:
        """What this holder has put; for the coordinator, which has every payload, anybody's will do."""
        if holder is not None:
            return self._kept.get((digest, holder))
        return next((kept for (d, _), kept in self._kept.items() if d == digest), None)

    def _keep(self, digest: bytes, holder: str | None, ref: Any, n_bytes: int) -> None:
        self._kept[digest, holder] = _KeptBlob(holder, ref, n_bytes, time.monotonic())
        self._forget_old()

    def _forget_old(self) -> None:
        """Drops references that were not used for long, and the oldest beyond KEPT_BYTES: Ray frees objects
        that nobody refers to."""
        now_s = time.monotonic()
        n_bytes = 0
        for key, kept in sorted(self._kept.items(), key=lambda entry: -entry[1].used_s):
            n_bytes += kept.n_bytes
            if kept.used_s < now_s - KEPT_S or n_bytes > KEPT_BYTES:
                del self._kept[key]

    async def forget_old_again_and_again(self) -> None:
        """Until it is cancelled: references that nobody has used for KEPT_S seconds go."""
        while True:
            await asyncio.sleep(KEPT_S / 4)
            self._forget_old()

    def _peer_of(self, line: bytes) -> str | None:
        entry = self._lines.get(line)
        return None if entry is None else entry.peer_id

    def _start(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
