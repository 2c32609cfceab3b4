"""A node's transport in a Ray cluster: streams to the coordinator are carried by calls of its actor, blobs go
through the object store.

What is written into a stream here comes out at the coordinator's handlers (`coordinator_transport`), and the
other way round, so that sessions, and what they survive, are the same as over libp2p. No call is ever
repeated: when one fails, its stream ends, and the session begins anew. Requests for blobs end in this
process: what is asked for comes as a reference from the object store of whoever has it, what is uploaded
goes there as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from ...compression.errors import ConfigError, SwarmUnreachable
from ...coordinator.protocol.libp2p.client import close_writer
from ...coordinator.protocol.messages import BadMessage
from ...coordinator.protocol.streams import BLOB, CHUNK_BYTES, SESSION, FrameKind, FrameLimits, Meter, Stream
from ...coordinator.protocol.transport import StreamHandler

_log = logging.getLogger("thinwire.ray")

T = TypeVar("T")

COORDINATOR: Final = "coordinator"
"""Its actor's name in the namespace of the run."""

LOCK_S: Final = 15.0
"""A process that was killed may hold its folder for a moment longer."""

PIECE_BYTES: Final = 2**20
"""Of a stream, in one call."""

ADDRESS_PREFIX: Final = "ray/"
NO_SESSION: Final = "there is no session with the coordinator"

_REQUESTS: FrameLimits = {FrameKind.GET: 65, FrameKind.PUT: 40}
"""A wish for fewer bytes may stand behind the digest: the object store has no use for it."""
_UPLOAD: FrameLimits = {FrameKind.CHUNK: CHUNK_BYTES, FrameKind.END: 32}
_ANSWER: FrameLimits = {FrameKind.SIZE: 8, FrameKind.NO: 2000}

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def once_free(lock: Callable[[], T]) -> T:
    """What `lock` gives, as soon as it does not raise ConfigError. Raises that when another process keeps
    it."""
    end_s = time.monotonic() + LOCK_S
    while True:
        try:
            return lock()
        except ConfigError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.2)


async def stream_pair() -> tuple[Ends, Ends]:
    """Two ends of a stream inside of this process."""
    ours, theirs = socket.socketpair()
    return await asyncio.open_connection(sock=ours), await asyncio.open_connection(sock=theirs)


async def read_blob(stream: Stream, digest: bytes) -> bytes | str:
    """Asks the handler at the other end of a pair for a blob: its bytes, unverified, or why not."""
    await stream.send(FrameKind.GET, digest)
    answer = await stream.receive(_ANSWER)
    if answer.kind is FrameKind.NO:
        return answer.body.decode(errors="replace")
    return await _chunks(stream)


async def _chunks(stream: Stream) -> bytes:
    parts = []
    while (frame := await stream.receive(_UPLOAD)).kind is FrameKind.CHUNK:
        parts.append(frame.body)
    return b"".join(parts)


class RayNodeTransport:
    """See `Transport`. `coordinator`: its peer id. Belongs to one event loop, of any thread."""

    port = 0
    addresses: tuple[str, ...] = ()

    def __init__(self, peer_id: str, coordinator: str) -> None:
        self._peer_id, self._coordinator = peer_id, coordinator
        self.died = asyncio.Event()  # a cluster that is gone is met as a coordinator that does not answer
        self._handlers: dict[str, StreamHandler] = {}
        self._actor: Any = None
        self._session: bytes | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    async def handle(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Nothing to do: other nodes are reached over the coordinator."""
        if peer_id != self._coordinator:
            return
        import ray

        namespace = addresses[0].removeprefix(ADDRESS_PREFIX)
        try:
            async with asyncio.timeout(timeout_s):
                self._actor = await asyncio.to_thread(ray.get_actor, COORDINATOR, namespace)
        except (ValueError, TimeoutError) as e:
            raise SwarmUnreachable(f"there is no coordinator in the cluster's namespace {namespace}") from e
        except ray.exceptions.RayError as e:
            raise SwarmUnreachable(f"the cluster does not answer: {_line(e)}") from e

    async def open_stream(self, peer_id: str, protocol: str, timeout_s: float) -> Ends:
        actor = self._actor
        if actor is None:
            raise SwarmUnreachable("the coordinator was not reached yet")
        if protocol == BLOB:
            if self._session is None:
                raise SwarmUnreachable(NO_SESSION)
            holder = None if peer_id == self._coordinator else peer_id
            near, far = await self._pair()
            self._start(self._serve_blobs(actor, holder, far))
            return near
        return await self._open_line(actor, protocol, timeout_s)

    async def disconnect(self, peer_id: str) -> None:
        self._session = None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    async def _pair(self) -> tuple[Ends, Ends]:
        """Two ends that are closed with this transport at the latest."""
        near, far = await stream_pair()
        open_ones = {w for w in self._writers if not w.is_closing() or w.transport.get_write_buffer_size()}
        self._writers = open_ones | {near[1], far[1]}
        return near, far

    # ------------------------------------------------------------------------------ streams over calls

    async def _open_line(self, actor: Any, protocol: str, timeout_s: float) -> Ends:
        """`attend` lasts as long as the line does. As its result belongs to this process, the coordinator
        sees at once when this process dies."""
        line = secrets.token_bytes(8)
        life = actor.attend.remote(line)
        near, far = await self._pair()
        try:
            async with asyncio.timeout(timeout_s):
                is_open = await _call(actor.connect.remote(line, self._peer_id, protocol, [life]))
            if not is_open:
                raise SwarmUnreachable(f"the coordinator does not serve {protocol}")
        except BaseException as e:
            actor.hang_up.remote(line)
            for _, writer in (near, far):
                writer.transport.abort()
            if isinstance(e, TimeoutError):
                raise SwarmUnreachable(
                    f"the coordinator's actor does not answer within {timeout_s:g} s"
                ) from e
            raise
        self._start(self._carry(actor, line, *far))
        if protocol == SESSION:
            self._session = line
            self._start(self._answer_wanted(actor, line))
        return near

    async def _carry(
        self, actor: Any, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Moves bytes both ways until either end closes the line, or a call fails."""
        both = [
            asyncio.create_task(_upwards(actor, line, reader)),
            asyncio.create_task(_downwards(actor, line, writer)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            actor.hang_up.remote(line)
            if self._session == line:
                self._session = None
            writer.close()

    # ------------------------------------------------------------------------------------------- blobs

    async def _serve_blobs(self, actor: Any, holder: str | None, far: Ends) -> None:
        """What a stream for blobs leads to: the object store. `holder` None: the coordinator.

        A stream may outlive a session; it breaks when something is asked for while there is none.
        """
        stream = Stream(*far, Meter())
        try:
            while True:
                kind, body = await stream.receive(_REQUESTS)
                line = self._session
                if line is None:
                    raise SwarmUnreachable(NO_SESSION)
                if kind is FrameKind.GET:
                    await self._get(actor, line, holder, stream, body[:32])
                else:
                    await self._put(actor, line, stream, body[:32])
        except (OSError, EOFError, BadMessage, SwarmUnreachable) as e:
            _log.debug("a stream for blobs ended: %s", e)
        finally:
            stream.abort()

    async def _get(self, actor: Any, line: bytes, holder: str | None, stream: Stream, digest: bytes) -> None:
        found: bytes | str = ""
        for is_fresh in (False, True):
            refs, why = await _call(actor.get_blob.remote(line, digest, holder, is_fresh))
            if why == NO_SESSION:
                raise SwarmUnreachable(why)
            if not refs:
                found = why
                break
            try:
                found = await _call(refs[0])
                break
            except SwarmUnreachable:  # whoever put it there is gone; the coordinator has it on its disk, too
                if is_fresh or holder is not None:
                    raise
        if isinstance(found, str):
            await stream.send(FrameKind.NO, found.encode()[:2000])
            return
        await stream.send(FrameKind.SIZE, len(found).to_bytes(8, "big"))
        for start in range(0, len(found), CHUNK_BYTES):
            await stream.send(FrameKind.CHUNK, found[start : start + CHUNK_BYTES])
        await stream.send(FrameKind.END, digest)

    async def _put(self, actor: Any, line: bytes, stream: Stream, digest: bytes) -> None:
        await stream.send(FrameKind.GO)
        ref = await _stored(await _chunks(stream))
        why = await _call(actor.put_blob.remote(line, digest, [ref]))
        if why == NO_SESSION:
            raise SwarmUnreachable(why)
        await (stream.send(FrameKind.DONE) if why is None else stream.send(FrameKind.NO, why.encode()[:2000]))

    async def _answer_wanted(self, actor: Any, line: bytes) -> None:
        """Other nodes ask for what this one has: the coordinator passes requests and references on."""
        answers: set[asyncio.Task[None]] = set()
        try:
            while (wanted := await _call(actor.wanted.remote(line))) is not None:
                for number, asker, digest in wanted:
                    task = asyncio.create_task(self._answer(actor, number, asker, digest))
                    answers.add(task)
                    task.add_done_callback(answers.discard)
        except SwarmUnreachable as e:
            _log.debug("no more requests for blobs: %s", e)
        finally:
            for task in answers:
                task.cancel()
            await asyncio.gather(*answers, return_exceptions=True)

    async def _answer(self, actor: Any, number: int, asker: str, digest: bytes) -> None:
        try:
            found = await ask_handler(self._handlers.get(BLOB), asker, digest)
            refs, why = ([], found) if isinstance(found, str) else ([await _stored(found)], "")
            await _call(actor.answer.remote(number, refs, why))
        except SwarmUnreachable as e:
            _log.debug("a request for a blob could not be answered: %s", e)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def ask_handler(handler: StreamHandler | None, asker: str, digest: bytes) -> bytes | str:
    """What a handler of blobs in this process gives to `asker`, or why nothing."""
    if handler is None:
        return "blobs are not served here"
    near, far = await stream_pair()
    task = asyncio.create_task(run_handler(handler, asker, *far))
    stream = Stream(*near, Meter())
    try:
        return await read_blob(stream, digest)
    except (OSError, EOFError, BadMessage) as e:
        return f"the holder gave up: {e}"
    finally:
        stream.abort()
        try:
            await asyncio.gather(task, return_exceptions=True)
        finally:
            far[1].transport.abort()


async def run_handler(
    handler: StreamHandler, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """The stream is closed when the handler returns."""
    try:
        await handler(peer_id, reader, writer)
    finally:
        await close_writer(writer)


async def _upwards(actor: Any, line: bytes, reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError, SwarmUnreachable):
        while data := await reader.read(PIECE_BYTES):
            if not await _call(actor.write.remote(line, data)):
                return


async def _downwards(actor: Any, line: bytes, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, SwarmUnreachable):
        while (data := await _call(actor.read.remote(line))) is not None:
            if data:
                writer.write(data)
                await writer.drain()


async def _stored(data: bytes) -> Any:
    """A reference to it in this machine's object store."""
    import ray

    return await asyncio.to_thread(ray.put, data)


async def _call(ref: Any) -> Any:
    """The result of an actor's call, or of an object. Raises SwarmUnreachable."""
    from ray.exceptions import RayError

    try:
        return await ref
    except RayError as e:
        raise SwarmUnreachable(_line(e)) from e


def _line(error: Exception) -> str:
    """One line of an error of Ray's, which fill pages: their names say enough."""
    words = {
        "ActorUnavailableError": "its actor is being started again",
        "ActorDiedError": "its actor has ended",
        "OwnerDiedError": "the process that had the object has ended",
        "ObjectLostError": "the object was lost with its machine",
    }
    name = type(error).__name__
    return words.get(name, name if not str(error) else f"{name}: {str(error).strip().splitlines()[-1][:300]}")
