"""What a link does in its event loop: what was offered, what is followed, what is fetched and served."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from thinwire.compression.errors import SwarmUnreachable, ThinwireError
from thinwire.coordinator.blob_streams import NotServed, get_blob, serve_blobs
from thinwire.coordinator.chain import Chain
from thinwire.coordinator.identity import public_key_of
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
from thinwire.node.link import Digest
from thinwire.node.mailbox import Mailbox
from thinwire.node.payloads import Payloads, Published
from thinwire.node.uplink import Hooks, Place, Uplink

MAX_BLOB_BYTES = 2**40
_DOWNLOADS = 2
_KNOWN_DIGESTS = 1024
_KEPT_REPORTS = 4
_SERVED_AT_ONCE = 16
_RETRY_S = 0.3
_MEMBERS_S = 0.5


class _Unlisted(SwarmUnreachable):
    """The peer is not on the member list."""


class LinkSession:
    """Lives in the event loop; `head`, `published` and `is_replica_wanted` are used from any thread."""

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
        try:
            return await self._fetch_from(holder, digest)
        except (NotServed, _Unlisted):
            # The member list may be on its way still, to this node or to the other one.
            await asyncio.sleep(_MEMBERS_S)
            return await self._fetch_from(holder, digest)

    async def _fetch_from(self, holder: str, digest: Digest) -> bytes:
        addresses = self._members.get(holder)
        if addresses is None:
            raise _Unlisted(f"{holder} is not connected to the swarm")
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
