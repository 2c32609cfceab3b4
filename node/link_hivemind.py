"""`Link` over libp2p: the session runs in an event loop of its own thread, the node calls from its thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from thinwire.compression.errors import ConfigError, SwarmUnreachable, ThinwireError
from thinwire.coordinator.blob_streams import NotServed, get_blob, serve_blobs
from thinwire.coordinator.chain import Chain
from thinwire.coordinator.identity import load_or_create, new_key, peer_id_of, public_key_of
from thinwire.coordinator.messages import (
    INLINE_BYTES,
    BadMessage,
    Commit,
    Follow,
    Head,
    Heartbeat,
    Members,
    Message,
    NodeState,
    Notice,
    Offer,
    Report,
    SnapshotAt,
    State,
    WantSnapshot,
    Welcome,
)
from thinwire.coordinator.streams import BLOB, Meter, Purpose, Stream
from thinwire.coordinator.ticket import Ticket
from thinwire.node.blob_client import BlobClient
from thinwire.node.link import Digest, LinkEvent, SnapshotRef, Traffic
from thinwire.node.mailbox import Mailbox
from thinwire.node.payloads import Payloads, Published
from thinwire.node.uplink import Hooks, Place, Uplink

T = TypeVar("T")

IDENTITY_NAME = "identity.key"
MAX_BLOB_BYTES = 2**40
_DOWNLOADS = 2
_KNOWN_DIGESTS = 1024
_KEPT_REPORTS = 4
_SERVED_AT_ONCE = 16
_RETRY_S = 0.3


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
        self._session: _Session | None = None

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
        self._session = _Session(
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

    def _opened(self) -> _Session:
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


class _Session:
    """The link's side in the event loop: what was offered, what is followed, what is fetched."""

    def __init__(
        self,
        ticket: Ticket,
        place: Place,
        mailbox: Mailbox,
        meter: Meter,
        patience_s: float,
        head: tuple[int | None, Digest | None],
    ) -> None:
        hooks = Hooks(
            head=self._known_head,
            greeting=self._greeting,
            connected=self._connected,
            received=self._received,
            beat=self._heartbeat,
            last_heard_s=lambda: max(self._uploads.heard_s, self._downloads.heard_s),
            tell=mailbox.put_event,
            refused=self._refused,
            failed=self._failed,
            blob_server=self._serve_blobs,
        )
        self._uplink = Uplink(ticket, place, meter, hooks, patience_s)
        self._mailbox, self._meter = mailbox, meter
        self._public_key = public_key_of(ticket.peer_id)
        self._uploads = BlobClient(lambda: self._uplink.open_stream(BLOB), 1)
        self._downloads = BlobClient(lambda: self._uplink.open_stream(BLOB), _DOWNLOADS)
        self.payloads = Payloads(self._download)
        self.published = Published()
        self.head = 0
        self.is_replica_wanted = False
        self._error: ThinwireError | None = None
        self._digests: OrderedDict[int, Digest] = OrderedDict()
        self._opened_at = head
        self._run_id = ticket.run_id
        self._chain: Chain | None = None
        self._taken: int | None = None
        self._skips = False
        self._room = asyncio.Event()
        self._state = NodeState.JOINING
        self._offer: Offer | None = None
        self._upload: asyncio.Task[None] | None = None
        self._reports: list[Report] = []
        self._members: dict[str, tuple[str, ...]] = {}
        self._n_served = 0
        self._payload_bytes = 0
        self._sizes: dict[Digest, int] = {}
        self._max_payload_bytes = MAX_BLOB_BYTES
        self._answer: asyncio.Future[SnapshotAt] | None = None

    async def open(self) -> Welcome:
        welcome = await self._uplink.open()
        body = welcome.body
        self.head = welcome.head_round
        self._max_payload_bytes = body.limits.max_payload_bytes
        self._sizes = {r.digest: r.n_bytes for r in (body.base, body.held_out, body.corpus) if r is not None}
        return welcome

    async def close(self, say_goodbye: bool) -> None:
        if say_goodbye and self._state is not NodeState.LEAVING:
            self.say_state(NodeState.LEAVING)
        await self._uplink.close(say_goodbye=say_goodbye)
        self._uploads.close()
        self._downloads.close()
        self.payloads.close()

    # ------------------------------------------------------------------------------ what the node says

    def say_state(self, state: NodeState) -> None:
        self._state = state
        self._uplink.post(State(state=state))

    def make_report(self, report: Report) -> None:
        self._reports = [*self._reports, report][-_KEPT_REPORTS:]
        self._uplink.post(report)

    def make_offer(self, offer: Offer) -> None:
        assert offer.payload is not None
        self._offer = offer
        self._payload_bytes += len(offer.payload)
        self._send_offer(offer)

    def _send_offer(self, offer: Offer) -> None:
        payload = offer.payload
        assert payload is not None
        if len(payload) <= INLINE_BYTES:
            self._uplink.post(offer)
            return
        digest = self.payloads.keep_own(payload)
        self._uplink.post(offer.model_copy(update={"payload": None, "digest": digest}))
        if self._upload is not None:
            self._upload.cancel()
        self._upload = asyncio.ensure_future(self._put(offer.round, digest, payload))

    async def _put(self, round_: int, digest: Digest, payload: bytes) -> None:
        for _ in range(2):  # a stream that the other end has closed shows it only when it is used
            try:
                await self._uploads.put(digest, payload, "payload")
            except NotServed as e:
                self._mailbox.put_event(f"the payload of round {round_} was not taken: {e}", True)
            except SwarmUnreachable:
                continue  # sent again with the offer after the next reconnect
            return

    # --------------------------------------------------------------------------------- what it follows

    async def follow(self, after: int) -> None:
        """Commits after this round go into the mailbox from now on."""
        if self._error is not None:
            raise self._error
        if self._chain is not None and self._taken == after:
            return
        self._chain = Chain(self._public_key, after, self._digest_of_round(after))
        self._taken, self._skips = after, True
        self._mailbox.clear_commits()
        self.payloads.restart(after)
        self._room.set()
        self._uplink.post(Follow(after=after))

    def taken(self, round_: int) -> None:
        """The node has taken this commit out of the mailbox."""
        self._taken = round_
        self._room.set()
        self.payloads.taken(round_)

    async def _commit(self, commit: Commit) -> None:
        """Raises LedgerCorrupt. Waits while the mailbox is full."""
        chain = self._chain
        if chain is None or self._is_left_over(chain, commit):
            return
        chain.check(commit)
        self._skips = False
        self._digests[chain.round] = commit.digest
        while len(self._digests) > _KNOWN_DIGESTS:
            self._digests.popitem(last=False)
        self.head = max(self.head, chain.round)
        if self._offer is not None and self._offer.round <= chain.round:
            self._offer = None
        self.payloads.arrived(commit)
        self._mailbox.put_commit(commit)
        while self._mailbox.is_full:
            self._room.clear()
            await self._room.wait()

    def _is_left_over(self, chain: Chain, commit: Commit) -> bool:
        """Of what was followed before: on its way when the node asked for other commits."""
        try:
            round_ = commit.body.round
        except BadMessage:
            return False
        return round_ <= chain.round or (self._skips and round_ > chain.round + 1)

    def _digest_of_round(self, round_: int) -> Digest | None:
        if round_ == 0:
            return self._run_id
        if round_ == self._opened_at[0]:
            return self._opened_at[1]
        return self._digests.get(round_)

    # ------------------------------------------------------------------------------ blobs and replicas

    async def _download(self, digest: Digest) -> bytes:
        """A blob from the coordinator; waits for its return. Raises SwarmUnreachable."""
        purpose: Purpose = "payload" if self.payloads.is_payload(digest) else "snapshot"
        max_bytes = self._sizes.get(digest, self._max_payload_bytes)
        refused = 0
        while True:
            if self._error is not None:
                raise SwarmUnreachable(str(self._error))
            await self._uplink.is_up.wait()
            try:
                return await self._downloads.get(digest, max_bytes, purpose)
            except NotServed:
                refused += 1
                if refused > 1:  # once is what a session that has just been replaced may answer
                    raise
            except SwarmUnreachable:
                pass
            await asyncio.sleep(_RETRY_S)

    async def fetch_from(self, holder: str, digest: Digest) -> bytes:
        """A blob that another node serves. Raises SwarmUnreachable."""
        addresses = self._members.get(holder)
        if addresses is None:
            raise SwarmUnreachable(f"{holder} is not connected to the swarm")
        stream = await self._uplink.open_stream_to(holder, addresses, BLOB)
        try:
            return await get_blob(stream, digest, self._sizes.get(digest, MAX_BLOB_BYTES), "snapshot")
        except (OSError, EOFError, BadMessage) as e:
            raise SwarmUnreachable(f"{holder} did not give the blob: {e}") from e
        finally:
            stream.abort()

    async def ask_for_snapshot(self) -> SnapshotAt:
        """Waits for the coordinator's answer, over reconnects."""
        if self._error is not None:
            raise self._error
        self._answer = asyncio.get_running_loop().create_future()
        self._uplink.post(WantSnapshot())
        answer = await self._answer
        self._answer = None
        self._sizes[answer.digest] = answer.n_bytes
        return answer

    async def _serve_blobs(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Members of the swarm may fetch what this node has published."""
        if self._n_served >= _SERVED_AT_ONCE:
            return
        self._n_served += 1
        stream = Stream(reader, writer, self._meter)
        try:
            await serve_blobs(stream, self.published, "snapshot", lambda: peer_id in self._members)
        except (OSError, EOFError, BadMessage, SwarmUnreachable):
            return  # the other node notices by itself
        finally:
            self._n_served -= 1

    # ----------------------------------------------------------------------------- what the uplink asks

    def _known_head(self) -> tuple[int | None, Digest | None]:
        if self._chain is not None and self._chain.digest is not None:
            return self._chain.round, self._chain.digest
        return self._opened_at

    def _connected(self, welcome: Welcome) -> None:
        self.head = max(self.head, welcome.head_round)

    def _greeting(self) -> list[Message]:
        said: list[Message] = []
        if self._chain is not None:
            said.append(Follow(after=self._chain.round))
        if self._state is not NodeState.JOINING:
            said.append(State(state=self._state))
        said += self._reports
        if self._answer is not None:
            said.append(WantSnapshot())
        if self._offer is not None:
            asyncio.get_running_loop().call_soon(self._resend_offer)
        return said

    def _resend_offer(self) -> None:
        if self._offer is not None:
            self._send_offer(self._offer)

    async def _received(self, message: Message) -> None:
        match message:
            case Commit():
                await self._commit(message)
            case Heartbeat(round=round_):
                self.head = max(self.head, round_)
            case Head():
                self._uplink.was_read.set()
            case Members(members=members):
                self._members = {m.peer_id: m.addresses for m in members}
            case Notice(text=text, warning=warning):
                self._mailbox.put_event(text, warning)
            case WantSnapshot():
                self.is_replica_wanted = True
            case SnapshotAt():
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
            case _:
                raise BadMessage(f"{type(message).__name__} is not for a node")

    def _heartbeat(self) -> Heartbeat:
        sent, received = self._meter.totals()
        return Heartbeat(
            round=self._taken or 0,
            sent_bytes=sent,
            received_bytes=received,
            payload_bytes=self._payload_bytes,
        )

    def _refused(self) -> None:
        # Whatever it was, it must not be sent again and again.
        self._offer = None
        self._reports.clear()

    def _failed(self, error: ThinwireError) -> None:
        self._error = error
        self._mailbox.fail(error)
        self._uplink.is_up.set()  # wakes downloads, which look at the error
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)


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
