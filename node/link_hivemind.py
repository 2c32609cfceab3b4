"""`Link` over libp2p: the session runs in an event loop of its own thread, the node calls from its thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from thinwire.compression.errors import ConfigError, SwarmUnreachable
from thinwire.coordinator.identity import load_or_create, new_key, peer_id_of
from thinwire.coordinator.messages import Commit, NodeState, Offer, Report, Welcome
from thinwire.coordinator.streams import Meter, Purpose
from thinwire.coordinator.ticket import Ticket
from thinwire.node.link import Digest, LinkEvent, SnapshotRef, Traffic
from thinwire.node.link_session import LinkSession
from thinwire.node.mailbox import Mailbox
from thinwire.node.uplink import Place

T = TypeVar("T")

IDENTITY_NAME = "identity.key"


class HivemindLink:
    """See `Link`. `state`: a folder for this node's identity, None for a new one each time.

    `host`, `port`: where other nodes reach this one; `announce`: addresses that they should try first.
    `patience_s`: how long to go on trying when the coordinator does not answer any more.
    """

    def __init__(
        self,
        ticket: Ticket,
        *,
        state: Path | None = None,
        host: str = "0.0.0.0",
        port: int = 0,
        announce: Sequence[str] = (),
        patience_s: float = 600.0,
    ) -> None:
        """Raises ConfigError (identity)."""
        self.run_id = ticket.run_id
        self._ticket, self._patience_s = ticket, patience_s
        key = new_key() if state is None else load_or_create(_made(state) / IDENTITY_NAME)
        self.peer_id = peer_id_of(key.public_key())
        self._place = Place(key, host, port, tuple(announce))
        self._mailbox = Mailbox()
        self._meter = Meter()
        self._closing = threading.Lock()
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._session: LinkSession | None = None

    # ----------------------------------------------------------------------------- the node's thread

    def open(self, head_round: int | None, head_digest: Digest | None) -> Welcome:
        with self._closing:
            if self._is_closed or self._loop is not None:
                raise SwarmUnreachable(
                    "the link is closed" if self._is_closed else "the link is open already"
                )
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
            self._thread.start()
        try:
            return self._wait(self._open(head_round, head_digest))
        except BaseException:
            self.close()
            raise

    async def _open(self, head_round: int | None, head_digest: Digest | None) -> Welcome:
        head = (head_round, head_digest)
        self._session = LinkSession(
            self._ticket, self._place, self._mailbox, self._meter, self._patience_s, head
        )
        return await self._session.open()

    @property
    def head(self) -> int:
        return 0 if self._session is None else self._session.head

    def state(self, state: NodeState) -> None:
        self._soon("say_state", state)

    def offer(self, offer: Offer) -> None:
        if offer.payload is None:
            raise ValueError("offer.payload carries the payload's bytes")
        self._soon("make_offer", offer)

    def report(self, report: Report) -> None:
        self._soon("make_report", report)

    def commits(self, after: int) -> Iterator[Commit]:
        if self._session is None or self._is_closed:
            return
        try:
            self._wait(self._session.follow(after))
        except SwarmUnreachable:
            if self._is_closed:
                return
            raise
        while (commit := self._mailbox.take_commit()) is not None:
            self._soon("taken", commit.body.round)
            yield commit

    def snapshot(self) -> SnapshotRef | None:
        session = self._opened()
        try:
            answer = self._wait(session.ask_for_snapshot())
        except SwarmUnreachable:
            if self._is_closed:
                return None
            raise
        if answer.holder is None:
            return None
        return SnapshotRef(answer.round, answer.digest, answer.n_bytes, answer.holder)

    def publish(self, blob: bytes) -> Digest:
        return self._opened().published.add(blob)

    def fetch(self, digest: Digest, holder: str | None = None) -> bytes:
        session = self._opened()
        if holder is None:
            return self._wait(session.payloads.get(digest))
        return self._wait(session.fetch_from(holder, digest))

    def wanted_snapshot(self) -> bool:
        session = self._session
        if session is None or not session.is_replica_wanted:
            return False
        session.is_replica_wanted = False
        return True

    def events(self) -> Iterator[LinkEvent]:
        while (event := self._mailbox.take_event()) is not None:
            yield event

    def traffic(self) -> Traffic:
        return Traffic(_without_heartbeats(self._meter.sent), _without_heartbeats(self._meter.received))

    def close(self) -> None:
        self._end(say_goodbye=True)

    def kill(self) -> None:
        """Ends the session as a crash of the node does: without a word."""
        self._end(say_goodbye=False)

    def _end(self, say_goodbye: bool) -> None:
        with self._closing:
            was_closed, self._is_closed = self._is_closed, True
            loop, thread = self._loop, self._thread
            if not was_closed and loop is not None and thread is not None:
                done = asyncio.run_coroutine_threadsafe(self._shut(say_goodbye), loop)
                self._mailbox.close()
                done.result()
                loop.call_soon_threadsafe(loop.stop)
                thread.join()
                _empty(loop)
                loop.close()
            self._mailbox.close()

    async def _shut(self, say_goodbye: bool) -> None:
        """Ends the session, then whatever still runs in the loop, so that nobody waits for it."""
        if self._session is not None:
            await self._session.close(say_goodbye)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_default_executor()

    def _opened(self) -> LinkSession:
        if self._session is None or self._is_closed:
            raise SwarmUnreachable("the link is not open")
        return self._session

    def _soon(self, method: str, argument: object) -> None:
        """Calls a method of the session in the loop; does nothing without a session."""
        if self._session is None or self._loop is None or self._is_closed:
            return
        try:
            self._loop.call_soon_threadsafe(getattr(self._session, method), argument)
        except RuntimeError:  # the loop was closed by another thread meanwhile
            return

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in the loop. Raises SwarmUnreachable when the link is closed meanwhile."""
        assert self._loop is not None
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except (concurrent.futures.CancelledError, RuntimeError) as e:
            work.close()
            if self._is_closed:
                raise SwarmUnreachable("the link was closed") from e
            raise


def _empty(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what other threads have asked for while the loop was about to stop: they wait for an answer."""

    async def cancel_all() -> None:
        late = asyncio.all_tasks() - {asyncio.current_task()}
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    loop.run_until_complete(cancel_all())


def _without_heartbeats(counts: Mapping[Purpose, int]) -> dict[str, int]:
    return {str(purpose): n for purpose, n in counts.items() if purpose != "heartbeat"}


def _made(state: Path) -> Path:
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise ConfigError(f"--state {state}: {e.strerror}") from e
    return state
