"""A node's session with the coordinator, kept alive over breaks. All of it runs in one event loop."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Protocol

from ...compression.errors import Incompatible, LedgerCorrupt, SwarmUnreachable, ThinwireError
from ...coordinator.protocol.figures import human_seconds
from ...coordinator.protocol.identity import is_signed_by
from ...coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    BadMessage,
    Commit,
    Digest,
    Follow,
    Heartbeat,
    Hello,
    Message,
    Refused,
    Welcome,
    digest_of,
    is_readable,
)
from ...coordinator.protocol.patience import Patience
from ...coordinator.protocol.streams import BLOB, FROM_COORDINATOR, SESSION, Meter, Stream, Throttle
from ...coordinator.protocol.ticket import Ticket
from ...coordinator.protocol.transport import Transport
from .upload_limit import UploadLimit

_log = logging.getLogger("thinwire.link")

DIAL_TIMEOUT_S = 10.0
QUICK_DIAL_S = 2.0
"""For other nodes, once it is known how quickly they answer."""

ANSWER_TIMEOUT_S = 15.0
"""Without a byte for this long, a coordinator that was just reached counts as not answering."""

GOODBYE_S = 5.0
FIRST_RETRY_S, LAST_RETRY_S = 0.25, 4.0
"""A restarted coordinator waits 10 s for the peers that it knew: who tries this often is among them."""

OVER_PATIENCE_S = 5.0
"""A coordinator that is gone when the run is over will hardly come back."""

STEADY_S = 10.0
"""A session that human_seconds for this long makes the next retries quick again."""

_PAUSE_S = 2.0


OpenTransport = Callable[[], Awaitable[Transport]]
"""Opens this node's transport in the network. Raises ConfigError."""


class SessionHandler(Protocol):
    """What a session with the coordinator asks its node, and tells it; all of it in the event loop."""

    def known_head(self) -> tuple[int | None, Digest | None]:
        """Round and digest of the last commit that the node has, for Hello; None: it has none."""
        ...

    def over_after(self) -> int | None:
        """The run's last round, if the node knows that it is committed; None: the run goes on."""
        ...

    def missing_commits(self, after: int, up_to: int) -> Iterator[Commit]:
        """Commits after the one round up to the other: for a coordinator that has lost them."""
        ...

    def connected(self, welcome: Welcome) -> None:
        """A session begins; the first one, or one after a break."""
        ...

    def greeting(self) -> list[Message]:
        """What a new session has to hear: state, what is followed, what was not yet acknowledged."""
        ...

    async def received(self, message: Message) -> None:
        """Raises LedgerCorrupt or BadMessage."""
        ...

    def heartbeat(self) -> Heartbeat: ...

    def last_heard_s(self) -> float:
        """When other streams last brought bytes from the coordinator, in monotonic seconds; 0: never."""
        ...

    def tell(self, text: str, warning: bool) -> None:
        """Something for people to read."""
        ...

    def refused(self) -> None:
        """The coordinator has closed the session because of something that this node has sent."""
        ...

    def failed(self, error: ThinwireError) -> None:
        """The session is over for good."""
        ...

    async def serve_blobs(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A `StreamHandler` for the blobs that other nodes ask for."""
        ...


class CoordinatorSession:
    """`open` once, then `post`; `close` at the end. Breaks are mended until `patience_s` is over.

    `limit`: of what this node sends, None: there is none; `device`: what people are told that it trains on;
    `agent`: see `Hello`.
    """

    def __init__(
        self,
        ticket: Ticket,
        open_transport: OpenTransport,
        meter: Meter,
        handler: SessionHandler,
        patience_s: float,
        limit: UploadLimit | None = None,
        device: str = "",
        agent: str = "thinwire",
    ) -> None:
        self._ticket, self._open_transport = ticket, open_transport
        self._meter, self._handler = meter, handler
        self._control = None if limit is None else limit.control
        self._patience_s, self._device, self._agent = patience_s, device, agent
        self._jitter = random.Random()
        self._queue: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._transport: Transport | None = None
        self._stream: Stream | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._retry_s = FIRST_RETRY_S
        self._dial_patience = Patience(floor_s=QUICK_DIAL_S, ceiling_s=DIAL_TIMEOUT_S)
        self.is_up, self._is_down = asyncio.Event(), asyncio.Event()
        self.was_read = asyncio.Event()
        """Set by the link: the coordinator has answered that this node leaves."""

    async def open(self) -> Welcome:
        """Raises SwarmUnreachable, ConfigError, Incompatible or LedgerCorrupt.

        A node that has been in the run before waits for the coordinator as after a break; a new one is told
        at once what is wrong with its ticket or network.
        """
        try:
            stream, welcome = await self._connect()
        except SwarmUnreachable as e:
            head_round, _ = self._handler.known_head()
            if not head_round:
                raise
            stream, welcome = await self._reconnect(str(e))
        self._keeping = asyncio.create_task(self._keep(stream, welcome))
        return welcome

    def post(self, message: Message) -> None:
        """Queues a message; dropped when there is no session, because its successor hears a greeting."""
        if self._stream is not None:
            self._queue.append(message)
            self._wake.set()

    async def open_stream(self, protocol: str, throttle: Throttle | None = None) -> Stream:
        """Another stream to the coordinator. Raises SwarmUnreachable."""
        if self._transport is None or not self.is_up.is_set():
            raise SwarmUnreachable("there is no connection to the coordinator")
        reader, writer = await self._transport.open_stream(self._ticket.peer_id, protocol, DIAL_TIMEOUT_S)
        return Stream(reader, writer, self._meter, throttle or self._control)

    async def open_stream_to(self, peer_id: str, addresses: Sequence[str], protocol: str) -> Stream:
        """A stream to another node. Raises SwarmUnreachable."""
        if self._transport is None:
            raise SwarmUnreachable("there is no connection to the swarm")
        began_s, limit_s = time.monotonic(), self._dial_patience.limit_s
        try:
            await self._transport.dial(peer_id, addresses, limit_s)
            reader, writer = await self._transport.open_stream(peer_id, protocol, limit_s)
        except SwarmUnreachable:
            if time.monotonic() - began_s >= limit_s:
                self._dial_patience.ran_out()
            raise
        self._dial_patience.took(time.monotonic() - began_s)
        return Stream(reader, writer, self._meter, self._control)

    async def close(self, *, say_goodbye: bool = True) -> None:
        """Waits until the coordinator has read that this node leaves, for at most 5 s and while there is a
        session, and ends all."""
        if say_goodbye and self._stream is not None:
            read, broken = (asyncio.create_task(e.wait()) for e in (self.was_read, self._is_down))
            await asyncio.wait({read, broken}, timeout=GOODBYE_S, return_when=asyncio.FIRST_COMPLETED)
            for task in (read, broken):
                task.cancel()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._transport is not None:
            await self._transport.close()
            self._transport = None

    # ------------------------------------------------------------------------------------- connecting

    async def _connect(self) -> tuple[Stream, Welcome]:
        transport = await self._living_transport()
        await transport.dial(self._ticket.peer_id, self._ticket.addresses, DIAL_TIMEOUT_S)
        reader, writer = await transport.open_stream(self._ticket.peer_id, SESSION, DIAL_TIMEOUT_S)
        stream = Stream(reader, writer, self._meter, self._control)
        try:
            welcome = await self._introduce(stream, transport.addresses)
        except (OSError, EOFError) as e:
            stream.abort()
            raise SwarmUnreachable(f"the coordinator closed the connection at once ({e})") from e
        except BaseException:
            stream.abort()
            raise
        return stream, welcome

    async def _introduce(self, stream: Stream, addresses: tuple[str, ...]) -> Welcome:
        """Says Hello on a new stream, and gives back what the coordinator has lost. `addresses`: own ones."""
        head_round, head_digest = self._handler.known_head()
        await stream.send_message(
            Hello(
                version=PROTOCOL_VERSION,
                run_id=self._ticket.run_id,
                token=self._ticket.token,
                head_round=head_round,
                head_digest=head_digest,
                addresses=addresses,
                agent=self._agent,
                device=self._device,
            )
        )
        answer = await _answer(stream)
        if isinstance(answer, Follow) and head_round is not None:
            answer = await self._return_commits(stream, answer.after, head_round)
        return _checked(self._ticket, answer)

    async def _return_commits(self, stream: Stream, after: int, head: int) -> Message:
        """The coordinator was restored from an older copy: sends what it has lost; returns its answer."""
        text = (
            f"the coordinator has lost rounds {after + 1} to {head}: giving them back from this node's copy"
        )
        self._handler.tell(text, True)

        async def send() -> None:
            for commit in self._handler.missing_commits(after, head):
                await stream.send_message(commit)
                stream.heard_s = time.monotonic()  # it is silent while it takes what is sent

        sending = asyncio.create_task(send())
        try:
            return await _answer(stream)  # a refusal may come before everything is sent
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _living_transport(self) -> Transport:
        if self._transport is not None and self._transport.died.is_set():
            self._handler.tell("this machine's libp2p has ended unexpectedly: starting it again", True)
            await self._transport.close()
            self._transport = None
        if self._transport is None:
            self._transport = await self._open_transport()
            await self._transport.handle(BLOB, self._handler.serve_blobs)
        return self._transport

    # -------------------------------------------------------------------------------- keeping it alive

    async def _keep(self, stream: Stream, welcome: Welcome) -> None:
        try:
            while True:
                why = await self._session(stream, welcome)
                if self.was_read.is_set():
                    return
                stream, welcome = await self._reconnect(why)
        except ThinwireError as e:
            self._handler.failed(e)

    async def _session(self, stream: Stream, welcome: Welcome) -> str:
        """One session from its Welcome to its end; returns why it ended. Raises what no retry can mend."""
        self._stream = stream
        began_s = time.monotonic()
        self._queue.clear()
        self._handler.connected(welcome)
        for message in self._handler.greeting():
            self.post(message)
        self.is_up.set()
        self._is_down.clear()
        assert self._transport is not None
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(self._read(stream)),
            asyncio.create_task(self._write(stream)),
            asyncio.create_task(self._beat(stream, welcome.heartbeat_s)),
            asyncio.create_task(self._transport.died.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.is_up.clear()
            self._is_down.set()
            self._stream = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stream.abort()
            if time.monotonic() - began_s > STEADY_S:
                self._retry_s = FIRST_RETRY_S
        return self._why_ended(done)

    def _why_ended(self, done: Iterable[asyncio.Task[object]]) -> str:
        """In words. `done`: the tasks of the session that have ended. Raises what no retry can mend."""
        error = next((e for task in done if (e := task.exception()) is not None), None)
        if error is None:
            return "this machine's libp2p has ended"
        if isinstance(error, BadMessage):
            self._handler.refused()
        if isinstance(error, OSError | EOFError | SwarmUnreachable | BadMessage):
            return str(error) or "the connection broke"
        raise error

    async def _reconnect(self, why: str) -> tuple[Stream, Welcome]:
        """Tries until it works. Raises SwarmUnreachable after `patience_s` (earlier, if the run is over),
        or what no retry can mend."""
        broke_s = time.monotonic()
        while True:
            away_s = time.monotonic() - broke_s
            over_after = self._handler.over_after()
            if over_after is not None and away_s > min(self._patience_s, OVER_PATIENCE_S):
                raise SwarmUnreachable(
                    f"the run is over after round {over_after}, and its coordinator does not answer: {why}"
                )
            if away_s > self._patience_s:
                raise SwarmUnreachable(f"the coordinator has not answered for {human_seconds(away_s)}: {why}")
            pause_s = self._retry_s * self._jitter.uniform(0.7, 1.3)
            self._handler.tell(
                f"the coordinator {_silent(away_s)} ({_one_line(why)}); "
                f"trying again in {human_seconds(pause_s)}; training state is kept",
                True,
            )
            await asyncio.sleep(pause_s)
            self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
            try:
                if self._transport is not None and not self._transport.died.is_set():
                    await self._transport.disconnect(self._ticket.peer_id)
                stream, welcome = await self._connect()
            except (SwarmUnreachable, BadMessage) as e:
                why = str(e)
                continue
            self._handler.tell(f"connected again after {time.monotonic() - broke_s:.0f} s", False)
            return stream, welcome

    async def _read(self, stream: Stream) -> None:
        while True:
            message = await stream.receive_message(FROM_COORDINATOR)
            if isinstance(message, Refused):
                raise message.as_error()
            await self._handler.received(message)

    async def _write(self, stream: Stream) -> None:
        while True:
            self._wake.clear()
            while self._queue:
                await stream.send_message(self._queue.popleft())
            await self._wake.wait()

    async def _beat(self, stream: Stream, heartbeat_s: float) -> None:
        """Sends heartbeats; raises SwarmUnreachable when the coordinator is silent for too long."""
        limit_s = max(10.0, 5 * heartbeat_s)
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(heartbeat_s)
            now_s = time.monotonic()
            if now_s - before_s > heartbeat_s + _PAUSE_S:
                stream.heard_s = now_s  # this process was stopped: it says nothing about the coordinator
            silent_s = now_s - max(stream.heard_s, self._handler.last_heard_s())
            if silent_s > limit_s:
                raise SwarmUnreachable(f"silent for {silent_s:.0f} s")
            self.post(self._handler.heartbeat())


async def _answer(stream: Stream) -> Message:
    """The first message; slow ones are waited for as long as bytes keep coming."""
    task = asyncio.create_task(stream.receive_message(FROM_COORDINATOR))
    stream.heard_s = time.monotonic()
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=1.0)
            if not task.done() and time.monotonic() - stream.heard_s > ANSWER_TIMEOUT_S:
                raise SwarmUnreachable(
                    f"the coordinator is reached but says nothing for {ANSWER_TIMEOUT_S:g} s"
                )
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return task.result()


def _checked(ticket: Ticket, answer: Message) -> Welcome:
    """A Welcome to the ticket's run, signed by the ticket's coordinator."""
    if isinstance(answer, Refused):
        raise answer.as_error()
    if not isinstance(answer, Welcome):
        raise BadMessage(f"Welcome is expected, not {type(answer).__name__}")
    if digest_of(answer.genesis) != ticket.run_id:
        raise Incompatible("the coordinator serves another run than the ticket's: ask for a new ticket")
    if not is_signed_by(ticket.peer_id, answer.signature, answer.genesis):
        raise LedgerCorrupt("record 0: its signature is not the coordinator's")
    if not is_readable(answer.body.protocol):
        raise Incompatible(
            f"the run has protocol version {answer.body.protocol}, this thinwire {PROTOCOL_VERSION}"
        )
    return answer


def _one_line(text: str) -> str:
    """A heading is followed by its list: "cannot reach it: A; B"."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {'; '.join(lines[1:])}"
    return "; ".join(lines)


def _silent(seconds: float) -> str:
    """With how long it has been, once that is a time to speak of."""
    return f"has not answered for {human_seconds(seconds)}" if seconds >= 1 else "does not answer"
