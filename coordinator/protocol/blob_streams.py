"""Blobs over a stream: GET and PUT, one request after the other, both ends.

GET digest     -> SIZE n, CHUNK ..., END digest    or NO reason; SIZE n again and again while the other end
                  waits for the blob itself
GET digest, 1 [, base]   -> the same; where SIZE has flags behind n, the chunks are packed blocks, each with
                  its length in front (`byte_planes`); flag 2: of what differs from `base`, as long a blob
GET digest, 5  -> AT peer: that one has it, and a wider line; or as above, packed by older builds alone
PUT digest, n  -> GO; CHUNK ..., END digest -> DONE    or DONE at once (it is here already)    or NO reason;
                  no GO where all of it has come with the request

The first `EARLY_BYTES` of a PUT may be sent before its GO, which saves a round trip; where DONE or NO come
instead, what was sent is dropped, up to its END.

A stream that is cut ends like a complete one, so the size, the END frame and the digest must all fit.
What breaks these rules raises BadFrame; its reason "frame_cut" is the only one that an honest peer can cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Protocol

from ...compression.byte_planes import MAX_BLOCK, BadBlock, max_packed_bytes, pack, unpack
from ...compression.errors import SwarmUnreachable
from .messages import BadMessage, digest_of
from .patience import Patience
from .streams import CHUNK_BYTES, BadFrame, Frame, FrameKind, FrameLimits, Stream, TrafficKind

_DIGEST_BYTES = 32
_SIZE = struct.Struct(">Q")
_LENGTH = struct.Struct(">I")
_PACKED, _DIFFERS, _REFERRED = 1, 2, 4
_MAX_NO_BYTES = 2000
_MAX_PEER_ID_BYTES = 100

STALL_S = 30.0
"""A transfer in which nothing moves for this long is given up."""

EARLY_BYTES = 2**20
"""So much of an upload may be in vain, because it is not wanted."""

WAITING_S = 0.5
"""Who is to pass on what is not there yet says so as often."""

QUICK_STALL_S = 5.0
"""Never earlier than this, however quickly the chunks came before."""


class Coming(Protocol):
    """A blob that is being uploaded, passed on as it comes. `n_bytes`: of the whole."""

    @property
    def n_bytes(self) -> int: ...

    async def read(self, n_bytes: int) -> bytes:
        """The next bytes, so many at most, once there are any; b"" after the last one. Raises
        SwarmUnreachable: it does not come any more."""
        ...

    def close(self) -> None: ...


_NO_TURNS: Mapping[TrafficKind, asyncio.Semaphore] = {}

PurposeOf = Callable[[bytes], TrafficKind]
"""What a blob's bytes are counted as, by its digest."""

_REQUESTS: FrameLimits = {FrameKind.GET: 2 * _DIGEST_BYTES + 1, FrameKind.PUT: _DIGEST_BYTES + _SIZE.size}
_DATA: FrameLimits = {FrameKind.CHUNK: CHUNK_BYTES, FrameKind.END: _DIGEST_BYTES}
_SIZE_OR_DATA: FrameLimits = {FrameKind.SIZE: _SIZE.size, **_DATA}
_REQUESTS_OR_DATA: FrameLimits = {**_REQUESTS, **_DATA}
_ANSWER_GET: FrameLimits = {FrameKind.SIZE: _SIZE.size + 1, FrameKind.NO: _MAX_NO_BYTES}
_ANSWER_REFERRED: FrameLimits = {**_ANSWER_GET, FrameKind.AT: _MAX_PEER_ID_BYTES}
_ANSWER_PUT: FrameLimits = {FrameKind.GO: 0, FrameKind.DONE: 0, FrameKind.NO: _MAX_NO_BYTES}
_ANSWER_END: FrameLimits = {FrameKind.DONE: 0, FrameKind.NO: _MAX_NO_BYTES}


class NotServed(SwarmUnreachable):
    """The other end is alive and says no; the stream can go on."""


class Referred(NotServed):
    """`holder` has the blob, too, and is to be asked first."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"{holder} has it")
        self.holder = holder


class Sink(Protocol):
    """Takes an upload, piece by piece. `sync` is called before `finish`, in a thread unless it `is_quick`: it
    may wait for the disk. `finish` gives its size in bytes; `abort` forgets it. The others raise BadMessage:
    the digest does not fit, or the disk does not take it."""

    @property
    def is_quick(self) -> bool: ...
    def write(self, chunk: bytes) -> None: ...
    def sync(self) -> None: ...
    def finish(self) -> int: ...
    def abort(self) -> None: ...


class Shelf(Protocol):
    """What a server of blobs offers to one peer. Methods raise BadMessage to refuse."""

    def open(self, digest: bytes) -> tuple[BinaryIO, int]:
        """The blob to read and its size. Raises KeyError: it is not here."""
        ...

    def sink(self, digest: bytes, n_bytes: int) -> Sink | None:
        """Where an upload goes; None: the blob is here already."""
        ...

    def stored(self, digest: bytes) -> None:
        """An upload is complete."""
        ...


def stall_patience() -> Patience:
    """For the gaps between the chunks of one peer's blobs: long until some are measured."""
    return Patience(floor_s=QUICK_STALL_S, ceiling_s=STALL_S, k=8.0)


def _nothing_comes(_digest: bytes) -> Coming | None:
    return None


def _nowhere(_digest: bytes) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Base:
    """An earlier version of a blob, which both ends may have."""

    digest: bytes
    data: bytes


async def get_blob(
    stream: Stream,
    digest: bytes,
    max_bytes: int,
    purpose: TrafficKind,
    patience: Patience | None = None,
    *,
    packed: bool = False,
    base: Base | None = None,
    waits: Callable[[], object] = bool,
    referred: bool = False,
) -> bytes:
    """`patience`: what is known of the gaps between this peer's chunks; it learns from this blob's. `packed`:
    asks for fewer bytes, of what differs from `base` if the other end has that, too. `waits`: hears whenever
    the other end says that it waits for the blob itself. `referred`: it may also say who else has it.

    Raises NotServed, Referred, SwarmUnreachable (stalled), BadFrame (cut, wrong bytes), EOFError or OSError.
    """
    patience = patience or stall_patience()
    packed = packed or referred
    wish = bytes([_PACKED | _REFERRED]) if referred else _wish(packed, base)
    await stream.send(FrameKind.GET, digest + wish)
    answer = await _next(stream, _ANSWER_REFERRED if referred else _ANSWER_GET, patience=patience)
    if answer.kind is FrameKind.AT:
        raise Referred(answer.body.decode(errors="replace"))
    if answer.kind is FrameKind.NO:
        raise NotServed(answer.body.decode(errors="replace"))
    n_bytes, flags = _size(answer.body[: _SIZE.size]), answer.body[_SIZE.size :]
    if n_bytes > max_bytes:
        raise BadFrame("frame_size", f"a blob of {n_bytes} bytes, at most {max_bytes} are expected")
    if flags:
        pieces = _blocks(stream, digest, n_bytes, purpose, patience, _base_of(flags, n_bytes, packed, base))
    else:
        pieces = _chunks(stream, digest, n_bytes, purpose, patience, waits)
    data = b"".join([piece async for piece in pieces])
    if digest_of(data) != digest:
        raise BadFrame("blob", f"blob {digest.hex()[:16]}: its bytes do not fit its digest")
    return data


async def get_blob_into(
    stream: Stream, digest: bytes, max_bytes: int, purpose: TrafficKind, open_sink: Callable[[int], Sink]
) -> None:
    """As `get_blob`, for what is larger than memory: piece by piece. `open_sink` takes its size; of what does
    not come whole nothing is left. Raises also what the sink raises."""
    await stream.send(FrameKind.GET, digest)
    answer = await _next(stream, _ANSWER_GET)
    if answer.kind is FrameKind.NO:
        raise NotServed(answer.body.decode(errors="replace"))
    n_bytes = _size(answer.body)
    if n_bytes > max_bytes:
        raise BadFrame("frame_size", f"a blob of {n_bytes} bytes, at most {max_bytes} are expected")
    sink = open_sink(n_bytes)
    try:
        async for chunk in _chunks(stream, digest, n_bytes, purpose, waits=bool):
            sink.write(chunk)
        await _finish(sink)
    except BaseException:
        sink.abort()
        raise


async def put_blob(
    stream: Stream,
    digest: bytes,
    data: bytes | Coming,
    purpose: TrafficKind,
    sent: Callable[[], object] = bool,
    n_early: int = EARLY_BYTES,
) -> None:
    """Returns when the other end has the blob on its disk. `sent`: is told when all of it has left;
    `n_early`: so many bytes do not wait for the word that it is wanted. Raises like `get_blob`, and what
    `data` raises."""
    source = _Whole(data) if isinstance(data, bytes) else data
    request = Frame(FrameKind.PUT, digest + _SIZE.pack(source.n_bytes))
    first = await source.read(stream.chunk_bytes) if n_early else b""
    whole = request, Frame(FrameKind.CHUNK, first), Frame(FrameKind.END, digest)
    if first and len(first) == source.n_bytes <= n_early and stream.frames_now(whole, purpose):
        sent()
        answer = await _next(stream, _ANSWER_PUT)
    else:
        await _send(stream, *request)
        answer = await _put_in_pieces(stream, digest, first, source, purpose, sent, n_early)
    if answer.kind is FrameKind.GO:
        answer = await _next(stream, _ANSWER_END)
    if answer.kind is FrameKind.NO:
        raise NotServed(answer.body.decode(errors="replace"))


async def _put_in_pieces(
    stream: Stream,
    digest: bytes,
    first: bytes,
    source: Coming,
    purpose: TrafficKind,
    sent: Callable[[], object],
    n_early: int,
) -> Frame:
    """What a request for an upload is answered. `first`: what was read of the source already."""
    answering = asyncio.ensure_future(_next(stream, _ANSWER_PUT))
    answering.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        n_sent = await _send_wanted(stream, first, source, purpose, answering, n_early)
        if n_sent == source.n_bytes:
            sent()
        if n_sent or (await answering).kind is FrameKind.GO:  # else no frame of it has left
            await _send(stream, FrameKind.END, digest)
        return await answering
    finally:
        answering.cancel()


async def _send_wanted(
    stream: Stream,
    first: bytes,
    source: Coming,
    purpose: TrafficKind,
    answering: asyncio.Future[Frame],
    n_early: int,
) -> int:
    """How many bytes have left: all, unless the answer is that no more are wanted."""
    n_sent, chunk = 0, first
    while chunk := chunk or await source.read(stream.chunk_bytes):
        is_early = n_sent < n_early and not answering.done()
        if not is_early and (await answering).kind is not FrameKind.GO:
            break
        await _send(stream, FrameKind.CHUNK, chunk, purpose)
        n_sent, chunk = n_sent + len(chunk), b""
    return n_sent


class _Whole:
    """Bytes that are all here, as what still comes is sent."""

    def __init__(self, data: bytes) -> None:
        self._data, self.n_bytes, self._n_read = data, len(data), 0

    async def read(self, n_bytes: int) -> bytes:
        piece = self._data[self._n_read : self._n_read + n_bytes]
        self._n_read += len(piece)
        return piece

    def close(self) -> None:
        pass


async def serve_blobs(
    stream: Stream,
    shelf: Shelf,
    purpose: TrafficKind | PurposeOf,
    allowed: Callable[[], bool],
    turns: Mapping[TrafficKind, asyncio.Semaphore] = _NO_TURNS,
    coming: Callable[[bytes], Coming | None] = _nothing_comes,
    given: Callable[[bytes], object] = bool,
    announced: Callable[[bytes], Awaitable[object]] | None = None,
    elsewhere: Callable[[bytes], str | None] = _nowhere,
) -> None:
    """Answers requests until the other end closes the stream or is no longer `allowed` to ask.

    `turns`: how many blobs of a kind are sent at once over all streams; the others wait. `coming`: what is
    not on the shelf yet, by its digest. `given`: is told of what was sent as a whole. `announced`: is waited
    for before an upload is let in, whose announcement comes on another stream; raises BadMessage: this peer
    sends none. `elsewhere`: whom to ask instead, of who would take that for an answer.
    Raises BadMessage for a peer that breaks the protocol, after telling it why; OSError if it is gone.
    """
    unwanted: int | None = None
    while True:
        try:
            kind, body = await _request(stream, unwanted)
        except EOFError:
            return
        unwanted = None
        if not allowed():
            await _say_no(stream, "only members of the swarm are served")
            raise BadFrame("stranger", "a request by a peer that is not a member")
        if announced is not None and kind is FrameKind.PUT:
            try:
                await announced(body[:_DIGEST_BYTES])
            except BadMessage as e:
                await _say_no(stream, str(e))
                raise
        counted_as = purpose(body[:_DIGEST_BYTES]) if callable(purpose) else purpose
        async with turns.get(counted_as) or contextlib.nullcontext():
            if kind is FrameKind.GET:
                if await _serve_get(stream, shelf, body, counted_as, coming, elsewhere):
                    given(body[:_DIGEST_BYTES])
            elif not await _serve_put(stream, shelf, body, counted_as):
                unwanted = EARLY_BYTES + CHUNK_BYTES


async def _request(stream: Stream, unwanted: int | None) -> Frame:
    """The next one. Before it may come so many bytes of an upload that was answered without GO; None: it was
    not. Raises EOFError, BadFrame or OSError."""
    while unwanted is not None:
        frame = await stream.receive(_REQUESTS_OR_DATA)
        if frame.kind in _REQUESTS:
            return frame
        unwanted -= len(frame.body)
        if frame.kind is FrameKind.END:
            break
        if unwanted < 0 or not frame.body:
            raise BadFrame("blob", "more and more of an upload that is not wanted")
    return await stream.receive(_REQUESTS)


async def _serve_get(
    stream: Stream,
    shelf: Shelf,
    body: bytes,
    purpose: TrafficKind,
    coming: Callable[[bytes], Coming | None],
    elsewhere: Callable[[bytes], str | None],
) -> bool:
    """Whether it was sent."""
    digest, wish = body[:_DIGEST_BYTES], body[_DIGEST_BYTES:]
    if wish and wish[0] & _REFERRED:
        wish = b""
        if (holder := elsewhere(digest)) is not None:
            await _send(stream, FrameKind.AT, holder.encode())
            return False
    try:
        file, n_bytes = shelf.open(digest)
    except KeyError:
        source = coming(digest)
        if source is None:
            await _say_no(stream, f"blob {digest.hex()[:16]} is not here")
            return False
        await _pass_on(stream, source, purpose)
    else:
        with file:
            if wish:
                await _send_packed(stream, file, n_bytes, _like(shelf, wish[1:], n_bytes), purpose)
            else:
                await _send(stream, FrameKind.SIZE, _SIZE.pack(n_bytes))
                while chunk := file.read(stream.chunk_bytes):
                    await _send(stream, FrameKind.CHUNK, chunk, purpose)
    await _send(stream, FrameKind.END, digest)
    return True


def _like(shelf: Shelf, digest: bytes, n_bytes: int) -> BinaryIO | None:
    """The blob that the other end says it has, if it is here, too, and as long."""
    if len(digest) != _DIGEST_BYTES:
        return None
    try:
        file, size = shelf.open(digest)
    except KeyError:
        return None
    if size == n_bytes:
        return file
    file.close()
    return None


async def _send_packed(
    stream: Stream, file: BinaryIO, n_bytes: int, base: BinaryIO | None, purpose: TrafficKind
) -> None:
    flags = _PACKED if base is None else _PACKED | _DIFFERS
    with base or contextlib.nullcontext():
        await _send(stream, FrameKind.SIZE, _SIZE.pack(n_bytes) + bytes([flags]))
        while block := file.read(MAX_BLOCK):
            like = None if base is None else base.read(len(block))
            packed = await asyncio.to_thread(pack, block, like)
            data = _LENGTH.pack(len(packed)) + packed
            for start in range(0, len(data), stream.chunk_bytes):
                await _send(stream, FrameKind.CHUNK, data[start : start + stream.chunk_bytes], purpose)


async def _pass_on(stream: Stream, source: Coming, purpose: TrafficKind) -> None:
    """Says that it waits as long as nothing has come."""
    size = _SIZE.pack(source.n_bytes)
    with contextlib.closing(source):
        await _send(stream, FrameKind.SIZE, size)
        first = asyncio.ensure_future(source.read(stream.chunk_bytes))
        try:
            while not (await asyncio.wait({first}, timeout=WAITING_S))[0]:
                await _send(stream, FrameKind.SIZE, size)
            chunk = await first
        finally:
            first.cancel()
        while chunk:
            await _send(stream, FrameKind.CHUNK, chunk, purpose)
            chunk = await source.read(stream.chunk_bytes)


async def _serve_put(stream: Stream, shelf: Shelf, body: bytes, purpose: TrafficKind) -> bool:
    """Whether it was wanted."""
    if len(body) != _DIGEST_BYTES + _SIZE.size:
        raise BadFrame("frame_size", f"a PUT frame of {len(body)} bytes")
    digest, n_bytes = body[:_DIGEST_BYTES], _size(body[_DIGEST_BYTES:])
    try:
        sink = shelf.sink(digest, n_bytes)
    except BadMessage as e:
        await _say_no(stream, str(e))
        return False
    if sink is not None:
        go_on = partial(_send, stream, FrameKind.GO)
        try:
            async for chunk in _chunks(stream, digest, n_bytes, purpose, go_on=go_on):
                sink.write(chunk)
            await _finish(sink)
        except BadMessage as e:
            sink.abort()
            await _say_no(stream, str(e))
            raise BadFrame("blob", str(e)) from e
        except BaseException:
            sink.abort()
            raise
    shelf.stored(digest)
    await _send(stream, FrameKind.DONE)
    return sink is not None


async def _finish(sink: Sink) -> None:
    """The event loop goes on while the disk writes: other blobs come, and heartbeats. Raises what the sink
    raises."""
    if sink.is_quick:
        sink.sync()
    else:
        await _in_a_thread(sink.sync)
    sink.finish()


async def _in_a_thread(sync: Callable[[], None]) -> None:
    syncing = asyncio.get_running_loop().run_in_executor(None, sync)
    try:
        await asyncio.shield(syncing)
    except asyncio.CancelledError:
        while not syncing.done():  # the thread has the file: it cannot be taken away before
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({syncing})
        syncing.exception()
        raise


async def _chunks(
    stream: Stream,
    digest: bytes,
    n_bytes: int,
    purpose: TrafficKind,
    patience: Patience | None = None,
    waits: Callable[[], object] | None = None,
    go_on: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[bytes]:
    """The chunks of a blob, exactly `n_bytes` and a fitting END, or BadFrame. `waits`: see `get_blob`; None:
    the other end has it. `go_on`: is called once, where not all is here yet."""
    missing = n_bytes
    while True:
        may_wait = waits is not None and missing == n_bytes
        if go_on is not None and not stream.has_frame:
            await go_on()
            go_on = None
        kind, body = await _next(stream, _SIZE_OR_DATA if may_wait else _DATA, purpose, patience)
        if kind is FrameKind.END:
            break
        if kind is FrameKind.SIZE and waits is not None:
            waits()
            continue
        missing -= len(body)
        if missing < 0 or not body:
            raise BadFrame("blob", f"blob {digest.hex()[:16]}: its chunks do not make {n_bytes} bytes")
        yield body
    if missing or body != digest:
        raise BadFrame("blob", f"blob {digest.hex()[:16]}: it ended {missing} bytes early")


def _wish(packed: bool, base: Base | None) -> bytes:
    """What stands behind the digest in a request."""
    if not packed:
        return b""
    return bytes([_PACKED]) + (b"" if base is None else base.digest)


def _base_of(flags: bytes, n_bytes: int, packed: bool, base: Base | None) -> bytes | None:
    """What packed blocks differ from; None: from nothing. Raises BadFrame for what nobody has asked for."""
    if packed and flags[0] == _PACKED:
        return None
    if packed and flags[0] == _PACKED | _DIFFERS and base is not None and len(base.data) == n_bytes:
        return base.data
    raise BadFrame("blob", "packed in a way that was not asked for")


async def _blocks(
    stream: Stream,
    digest: bytes,
    n_bytes: int,
    purpose: TrafficKind,
    patience: Patience | None,
    base: bytes | None,
) -> AsyncIterator[bytes]:
    """The blocks of a packed blob, exactly `n_bytes` in all and a fitting END, or BadFrame."""
    done, coming = 0, bytearray()
    while True:
        kind, body = await _next(stream, _DATA, purpose, patience)
        if kind is FrameKind.END:
            break
        coming += body
        while (packed := _next_block(coming, min(MAX_BLOCK, n_bytes - done))) is not None:
            size = min(MAX_BLOCK, n_bytes - done)
            like = None if base is None else base[done : done + size]
            try:
                yield await asyncio.to_thread(unpack, packed, size, like)
            except BadBlock as e:
                raise BadFrame("blob", f"blob {digest.hex()[:16]}: {e}") from e
            done += size
        if not body or (done == n_bytes and coming):
            raise BadFrame("blob", f"blob {digest.hex()[:16]}: its blocks do not make {n_bytes} bytes")
    if done < n_bytes or coming or body != digest:
        raise BadFrame("blob", f"blob {digest.hex()[:16]}: it ended {n_bytes - done} bytes early")


def _next_block(coming: bytearray, n_bytes: int) -> bytes | None:
    """Taken off what has come; None: it is not whole yet, or there is none any more. Raises BadFrame."""
    if n_bytes == 0 or len(coming) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(coming)
    if length > max_packed_bytes(n_bytes):
        raise BadFrame("blob", f"a packed block of {length} bytes, of {n_bytes}")
    if len(coming) < _LENGTH.size + length:
        return None
    packed = bytes(coming[_LENGTH.size : _LENGTH.size + length])
    del coming[: _LENGTH.size + length]
    return packed


async def _next(
    stream: Stream, limits: FrameLimits, purpose: TrafficKind = "control", patience: Patience | None = None
) -> Frame:
    began_s = time.monotonic()
    if stream.has_frame:  # a timer costs more than the frame
        frame = await stream.receive(limits, purpose)
    else:
        limit_s = STALL_S if patience is None else patience.limit_s
        try:
            async with asyncio.timeout(limit_s):
                frame = await stream.receive(limits, purpose)
        except TimeoutError as e:
            if patience is not None:
                patience.ran_out()
            raise SwarmUnreachable(f"the transfer stood still for {limit_s:.1f} s") from e
    if patience is not None:
        patience.took(time.monotonic() - began_s)
    return frame


async def _send(stream: Stream, kind: FrameKind, body: bytes = b"", purpose: TrafficKind = "control") -> None:
    if stream.frames_now([Frame(kind, body)], purpose):  # a timer for every frame costs more than the frame
        return
    try:
        async with asyncio.timeout(STALL_S):
            await stream.send(kind, body, purpose)
    except TimeoutError as e:
        raise SwarmUnreachable(f"the transfer stood still for {STALL_S:g} s") from e


async def _say_no(stream: Stream, text: str) -> None:
    await _send(stream, FrameKind.NO, text.encode()[:_MAX_NO_BYTES])


def _size(body: bytes) -> int:
    if len(body) != _SIZE.size:
        raise BadFrame("frame_size", f"a size of {len(body)} bytes")
    n_bytes: int = _SIZE.unpack(body)[0]
    return n_bytes
