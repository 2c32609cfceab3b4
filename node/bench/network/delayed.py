"""Links of a chosen delay and rate on this machine: TCP through pipes in user space that hold bytes back."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

_PIECE_BYTES = 256 * 1024
_PIECE_S = 0.005
"""Of a line of some rate no more at once: bytes that come one by one there come one by one here."""
_LEAST_BYTES = 1500

_QUEUED = 256
"""Pieces under way: 64 MiB, more than a connection keeps in flight; of a slow line those of a second."""


class Delays:
    """Doors to ports of 127.0.0.1, each way `one_way_s` long, in a process of their own: a network costs
    those that are measured nothing. Every connection through a door has `bytes_per_s` for itself in each
    direction; 0: as much as there is. Use as a context manager; `door` is called from any thread."""

    def __init__(self, one_way_s: float, bytes_per_s: float = 0.0) -> None:
        self._one_way_s, self._bytes_per_s = one_way_s, bytes_per_s
        self._asking = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._one_way_s), str(self._bytes_per_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.communicate()  # the end of its input ends it

    def door(self, port: int) -> int:
        """A port that leads to that one; itself, where nothing is between."""
        if not (self._one_way_s or self._bytes_per_s):
            return port
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(f"{port}\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())


class _Doors:
    """In that process."""

    def __init__(self, one_way_s: float, bytes_per_s: float) -> None:
        self._one_way_s, self._bytes_per_s = one_way_s, bytes_per_s
        self._pipes: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """A port on each line of the input, and on each line of the output the door to it, until the input
        ends."""
        while line := await asyncio.to_thread(sys.stdin.readline):
            sys.stdout.write(f"{await self._open(int(line))}\n")
            sys.stdout.flush()

    async def _open(self, port: int) -> int:
        async def serve(near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._pipes.add(task)
            try:
                far, to_far = await asyncio.open_connection("127.0.0.1", port, limit=_PIECE_BYTES)
                with contextlib.suppress(OSError):
                    await asyncio.gather(self._pass(near, to_far), self._pass(far, to_near))
                to_far.close()
            except (OSError, asyncio.CancelledError):
                pass  # one end is gone, or all is over
            finally:
                to_near.close()
                self._pipes.discard(task)

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_PIECE_BYTES)
        found: int = server.sockets[0].getsockname()[1]
        return found

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, until its end."""

        async def give(data: bytes) -> None:
            if not data:
                raise ConnectionResetError("closed by its other end")
            writer.write(data)
            await writer.drain()

        line = _Line(self._one_way_s, self._bytes_per_s)
        await pass_later(reader, give, line.delay_s, line.piece_bytes, _QUEUED)


class _Line:
    """One direction of a connection: bytes leave one after the other."""

    def __init__(self, one_way_s: float, bytes_per_s: float) -> None:
        self._one_way_s, self._byte_s = one_way_s, 1 / bytes_per_s if bytes_per_s else 0.0
        self._free_s = 0.0
        in_a_piece = max(_LEAST_BYTES, round(bytes_per_s * _PIECE_S)) if bytes_per_s else _PIECE_BYTES
        self.piece_bytes = min(in_a_piece, _PIECE_BYTES)

    def delay_s(self, n_bytes: int) -> float:
        """From now on, of so many."""
        now_s = time.monotonic()
        self._free_s = max(self._free_s, now_s) + n_bytes * self._byte_s
        return self._free_s - now_s + self._one_way_s


async def pass_later(
    reader: asyncio.StreamReader,
    give: Callable[[bytes], Awaitable[None]],
    delay_s: Callable[[int], float],
    piece_bytes: int,
    n_queued: int,
) -> None:
    """Gives what comes, in pieces, each one `delay_s` of its bytes later than it came, and b"" at the end,
    until `give` raises something. The delay is a queue, and costs no throughput as long as so many pieces
    suffice."""
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(n_queued)

    async def feed() -> None:
        data = b"x"
        while data:
            try:
                data = await reader.read(piece_bytes)
            except OSError:
                data = b""
            await queue.put((time.monotonic() + delay_s(len(data)), data))

    feeder = asyncio.create_task(feed())
    try:
        while True:
            due_s, data = await queue.get()
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await give(data)
    finally:
        feeder.cancel()


if __name__ == "__main__":
    asyncio.run(_Doors(float(sys.argv[1]), float(sys.argv[2])).serve())
