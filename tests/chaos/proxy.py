"""A TCP proxy in this process, between one node and its coordinator, whose faults are switched while it runs.

It opens nothing of what passes: libp2p's handshake goes through it unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from thinwire.node.bench.network.delayed import pass_later

MBIT_BYTES_PER_S = 125_000
"""1 Mbit/s."""

Blocks = Callable[[int, bool], bool]
"""(source port of a connection, towards the target?) -> whether its bytes are held back."""

_LOOK_S = 0.05
_BACKLOG = 4
_QUEUED_BYTES = 256 * 1024
_PIECE_BYTES = 16 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: a closed socket sends RST


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes connections on to `target_port` there.

    Its methods are called from any thread. `sent_bytes`: towards the target; `received_bytes`: from it;
    `accepted`: connections so far; `resets`: how often it ended them all.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.sent_bytes = self.received_bytes = self.accepted = self.resets = 0
        self.delay_s = 0.0
        self.rate_bytes_per_s: float | None = None
        self._blocks: Blocks | None = None
        self._cut_at_bytes: int | None = None
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._fillers: list[socket.socket] = []
        self._filler_ports: set[int] = set()
        self._pipes: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self._call(self._begin())

    # ---------------------------------------------------------------------------------------- the faults

    def black_hole(self) -> None:
        """From now on nothing passes, no end sees the other one close, and connecting times out."""
        self._call(self._close_gate())

    def reset(self) -> None:
        """Ends every connection at once with RST, to both ends. New ones pass."""
        self._call(self._reset())

    def cut_after(self, n_bytes: int) -> None:
        """Ends every connection with RST when this many more bytes have passed: amid a transfer."""
        self._cut_at_bytes = self.sent_bytes + self.received_bytes + n_bytes

    def slow(self, *, delay_s: float = 0.0, rate_bytes_per_s: float | None = None) -> None:
        """Every byte comes later by `delay_s`, and no more than this many a second in each direction."""
        self.delay_s, self.rate_bytes_per_s = delay_s, rate_bytes_per_s

    def cut_one_way(self, blocks: Blocks) -> None:
        """From now on bytes of some connections do not pass in one direction; no end sees it closed."""
        self._blocks = blocks

    def restore(self) -> None:
        """Ends all faults. What a black hole has kept back is passed on, as TCP would send it again."""
        self.slow()
        self._cut_at_bytes = self._blocks = None
        self._call(self._open_gate())

    def close(self) -> None:
        """Ends everything; may be called twice."""
        if self._loop.is_closed():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- in the event loop

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _begin(self) -> None:
        self._gate = asyncio.Event()
        self._gate.set()
        self._acceptor = asyncio.create_task(self._accept())

    async def _close_gate(self) -> None:
        if not self._gate.is_set():
            return
        self._gate.clear()
        self._acceptor.cancel()
        await asyncio.gather(self._acceptor, return_exceptions=True)
        # The kernel accepts connections on its own until the backlog is full: after that it drops them.
        for _ in range(2 * _BACKLOG):
            filler = socket.socket()
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filler.connect(("127.0.0.1", self.port))
            self._fillers.append(filler)
            self._filler_ports.add(filler.getsockname()[1])

    async def _open_gate(self) -> None:
        if self._gate.is_set():
            return
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()
        self._gate.set()
        self._acceptor = asyncio.create_task(self._accept())

    async def _reset(self) -> None:
        self.resets += 1
        for writer in list(self._writers):
            _abort(writer)

    async def _end(self) -> None:
        await self._reset()
        tasks = [self._acceptor, *self._pipes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in (self._listener, *self._fillers):
            sock.close()

    async def _accept(self) -> None:
        while True:
            sock, address = await self._loop.sock_accept(self._listener)
            if address[1] in self._filler_ports:
                self._filler_ports.discard(address[1])
                sock.close()
                continue
            self.accepted += 1
            task = asyncio.create_task(self._serve(sock))
            self._pipes.add(task)
            task.add_done_callback(self._pipes.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """One connection, until either end closes it."""
        source = sock.getpeername()[1]
        near_reader, near = await asyncio.open_connection(sock=sock)
        self._writers.add(near)
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:  # nobody listens there: the node sees its connection reset
            _abort(near)
            self._writers.discard(near)
            return
        self._writers.add(far)
        try:
            await asyncio.gather(
                self._pipe(near_reader, far, True, source), self._pipe(far_reader, near, False, source)
            )
        except OSError:
            pass  # one end is gone: so is the other
        finally:
            for writer in (near, far):
                _abort(writer)
                self._writers.discard(writer)

    async def _pipe(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool, source: int
    ) -> None:
        """One direction."""

        async def give(data: bytes) -> None:
            if self.rate_bytes_per_s is not None:
                await asyncio.sleep(len(data) / self.rate_bytes_per_s)
            await self._gate.wait()
            while self._blocks is not None and self._blocks(source, up):
                await asyncio.sleep(_LOOK_S)
            if not data:
                raise ConnectionResetError("closed by its other end")
            writer.write(data)
            await writer.drain()
            await self._count(len(data), up)

        await pass_later(
            reader, give, lambda _n_bytes: self.delay_s, _PIECE_BYTES, _QUEUED_BYTES // _PIECE_BYTES
        )

    async def _count(self, n_bytes: int, up: bool) -> None:
        if up:
            self.sent_bytes += n_bytes
        else:
            self.received_bytes += n_bytes
        if self._cut_at_bytes is not None and self.sent_bytes + self.received_bytes >= self._cut_at_bytes:
            self._cut_at_bytes = None
            await self._reset()


def _abort(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
