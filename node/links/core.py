"""What a link does in its event loop: what was offered, what is followed, what is fetched and served."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from ...compression.errors import LedgerCorrupt, SwarmUnreachable, ThinwireError
from ...coordinator.protocol.blob_streams import NotServed, serve_blobs
from ...coordinator.protocol.chain import REPAIR_FORK, Forked
from ...coordinator.protocol.exposition import packed
from ...coordinator.protocol.ledger_copy import LedgerCopy
from ...coordinator.protocol.messages import (
    INLINE_BYTES,
    AskMetrics,
    BadMessage,
    Commit,
    Digest,
    Follow,
    Head,
    Heartbeat,
    Members,
    Message,
    NodeState,
    Notice,
    Offer,
    Offered,
    OfferEntry,
    Phases,
    Report,
    State,
    Welcome,
    digest_of,
)
from ...coordinator.protocol.streams import BLOB, Meter, Stream, TrafficKind
from ...coordinator.protocol.ticket import Ticket
from .base import Lied
from .blob_client import BlobClient, Holders
from .coordinator_session import CoordinatorSession, Hooks, OpenTransport
from .mailbox import Mailbox
from .payloads import AHEAD, LONG_WAIT_S, Payloads, Served
from .upload_limit import UploadLimit

_log = logging.getLogger("thinwire.link")

_DOWNLOADS = 4
_MEASURED_UPLOADS = 8
_KEPT_REPORTS = 8
_SERVED_AT_ONCE = 16
_STREAMS_PER_MEMBER = 8
_RETURNED_AT_ONCE = 64
_RETRY_S = 0.3
_MEMBERS_S = 0.5


_GRACE_S = 30.0
"""Who is off the member list counts as a member between nodes for so long: a coordinator that was restarted
lists its peers as they come back."""


class _Unlisted(SwarmUnreachable):
    """The peer is not on the member list."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """Where a member is reached, and until when it counts as one, in monotonic seconds."""

    addresses: tuple[str, ...]
    until_s: float


@dataclass(frozen=True, slots=True)
class About:
    """What people are told of a node: what it trains on, and how long the parts of its rounds take (called in
    the link's thread, with every heartbeat)."""

    device: str = ""
    phases: Callable[[], Phases | None] = lambda: None


class LinkCore:
    """Lives in the event loop; `head`, `served` and `members` are used from any thread.

    `copy_path`: where the copy of the ledger is on disk, if it is. `metrics`: see `HivemindLink`.
    """

    def __init__(
        self,
        ticket: Ticket,
        open_transport: OpenTransport,
        mailbox: Mailbox,
        meter: Meter,
        patience_s: float,
        *,
        peer_id: str,
        copy: LedgerCopy,
        copy_path: Path | None,
        limit: UploadLimit | None = None,
        metrics: Callable[[], bytes] = bytes,
        about: About = About(),
    ) -> None:
        hooks = Hooks(
            head=self._known_head,
            missing=self._missing,
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
        self._coordinator = CoordinatorSession(
            ticket, open_transport, meter, hooks, patience_s, limit, about.device
        )
        self._limit = limit
        self._metrics, self._phases = metrics, about.phases
        self._answering: asyncio.Task[None] | None = None
        self._mailbox, self._meter = mailbox, meter
        self._peer_id, self._copy, self._copy_path = peer_id, copy, copy_path
        self._uploads = BlobClient(
            lambda: self._coordinator.open_stream(BLOB, None if limit is None else limit.own), 1
        )
        self._downloads = BlobClient(lambda: self._coordinator.open_stream(BLOB), _DOWNLOADS)
        self._holders = Holders(self._open_stream_to)
        self.payloads = Payloads(self, peer_id)
        self.served = Served(self.payloads.kept, self._has_time_for)
        self.upload_bytes_per_s: float | None = None
        """As payloads reached the coordinator: the median of the last ones; None: none has yet."""
        self._upload_rates: deque[float] = deque(maxlen=_MEASURED_UPLOADS)
        self.head = copy.head_round
        self._error: ThinwireError | None = None
        self._taken: int | None = None
        self._state = NodeState.JOINING
        self._needs_after: int | None = None
        self._offer: Offer | None = None
        self._upload: asyncio.Task[None] | None = None
        self._reports: deque[Report] = deque(maxlen=_KEPT_REPORTS)
        self._listed: dict[str, _Listed] = {}
        self._turns = asyncio.Semaphore(_SERVED_AT_ONCE)
        self._streams_of: Counter[str] = Counter()
        self._payload_bytes = 0

    async def open(self) -> Welcome:
        try:
            welcome = await self._coordinator.open()
        except LedgerCorrupt as e:
            raise self._with_command(e) from e
        self.head = max(self.head, welcome.head_round)
        limits = welcome.body.limits
        self.payloads.max_offers, self.payloads.max_bytes = limits.max_peers, limits.max_payload_bytes
        return welcome

    async def close(self, say_goodbye: bool) -> None:
        if say_goodbye and self._state is not NodeState.LEAVING:
            self.say_state(NodeState.LEAVING, None)
        await self._coordinator.close(say_goodbye=say_goodbye)
        self._uploads.close()
        self._downloads.close()
        self._holders.close()
        self.payloads.close()

    # ------------------------------------------------------------------------------ what the node says

    def say_state(self, state: NodeState, needs_after: int | None) -> None:
        self._state, self._needs_after = state, needs_after
        self._coordinator.post(State(state=state, needs_after=needs_after))

    def make_report(self, report: Report) -> None:
        self._reports.append(report)
        self._coordinator.post(report)

    def make_offer(self, offer: Offer) -> None:
        assert offer.payload is not None
        if offer.round < self._copy.head_round:
            # Told to be far too late, so that its time is known; its payload is of use to nobody.
            self._coordinator.post(_without_payload(offer))
            return
        self._offer = offer
        self._payload_bytes += len(offer.payload)
        self._send_offer(offer)

    def _send_offer(self, offer: Offer) -> None:
        payload = offer.payload
        assert payload is not None
        if len(payload) <= INLINE_BYTES:
            self._coordinator.post(offer)
            return
        digest = self.payloads.keep_own(offer.round, payload)
        self._coordinator.post(offer.model_copy(update={"payload": None, "digest": digest}))
        if self._upload is not None:
            self._upload.cancel()
        self._upload = asyncio.ensure_future(self._put(offer.round, digest, payload))

    async def _put(self, round_: int, digest: Digest, payload: bytes) -> None:
        """Until the coordinator has it or the round is over; after a reconnect the offer is sent anew."""
        while self._offer is not None and self._offer.round == round_:
            began_s = time.monotonic()
            try:
                await self._uploads.put(digest, payload, "payload")
            except NotServed as e:
                self._mailbox.put_event(f"the payload of round {round_} was not taken: {e}", True)
            except SwarmUnreachable:
                await asyncio.sleep(_RETRY_S)
                await self._coordinator.is_up.wait()
                continue
            self._upload_rates.append(len(payload) / max(time.monotonic() - began_s, 1e-6))
            self.upload_bytes_per_s = median(self._upload_rates)
            return

    def _has_time_for(self, n_bytes: int) -> bool:
        """Whether all members may come for a payload of this node's: those who are refused go to the
        coordinator at once, where it is, too."""
        limit = self._limit
        return limit is None or n_bytes * len(self._listed) <= limit.rate_bytes_per_s * LONG_WAIT_S

    # --------------------------------------------------------------------------------- what it follows

    def taken(self, round_: int) -> None:
        """The node works on this commit now, and will take those after it next."""
        self._taken = round_
        self._fetch_ahead()

    def _fetch_ahead(self) -> None:
        if self._taken is not None:
            commits = self._copy.commits(self._taken - 1, AHEAD + 1)
            self.payloads.want(commits, self._copy.peers)

    def _commit(self, commit: Commit) -> None:
        """Raises LedgerCorrupt."""
        try:
            self._copy.append(commit)
        except Forked as e:
            raise LedgerCorrupt(f"{e}. {REPAIR_FORK}") from e
        round_ = self._copy.head_round
        self.head = max(self.head, round_)
        if self._offer is not None and self._offer.round <= round_:
            self._offer = None
        self.payloads.committed(commit)
        if self._taken is not None and round_ <= self._taken + AHEAD:
            self._fetch_ahead()
        self._mailbox.commits_came()

    def _with_command(self, error: LedgerCorrupt) -> LedgerCorrupt:
        """What is wrong and why, and what to do here if the coordinator's ledger is the one to go on with."""
        if self._copy_path is None:
            return LedgerCorrupt(f"{error} This node has no --state directory: start it again.")
        return LedgerCorrupt(f"{error} What this node has seen is in {self._copy_path}: rm it to give it up.")

    # ------------------------------------------------------------------------------------------- blobs

    async def payload(self, entry: OfferEntry) -> bytes:
        """See `Link.payload`."""
        return await self.payloads.get(entry, self._copy.peers.get(entry.peer))

    async def fetch(self, digest: Digest, n_bytes: int) -> bytes:
        """A blob from the coordinator; waits for its return. Raises SwarmUnreachable."""
        refused = 0
        while True:
            try:
                return await self._from_coordinator(digest, n_bytes, "snapshot")
            except (NotServed, Lied):
                refused += 1
                if refused > 1:  # once is what a session that has just been replaced may answer
                    raise
            except SwarmUnreachable:
                await self.reconnected(None)
            await asyncio.sleep(_RETRY_S)

    async def fetch_from(self, holder: str, digest: Digest, n_bytes: int) -> bytes:
        """A blob that another node serves. Raises SwarmUnreachable."""
        try:
            return await self._holders.get(holder, digest, n_bytes, "snapshot")
        except (NotServed, _Unlisted):
            if self._holders.has_answered(holder):
                raise
        # The member list may be on its way still, to this node or to the other one.
        await asyncio.sleep(_MEMBERS_S)
        return await self._holders.get(holder, digest, n_bytes, "snapshot")

    async def from_coordinator(self, digest: Digest, n_bytes: int) -> bytes:
        """One attempt to get a payload, for `Payloads`."""
        return await self._from_coordinator(digest, n_bytes, "payload")

    async def from_member(self, holder: str, digest: Digest, n_bytes: int) -> bytes:
        return await self._holders.get(holder, digest, n_bytes, "payload")

    def members(self, first: str | None = None) -> list[str]:
        """The others that are connected: those that answer before those that do not, `first` before all."""
        now = [peer_id for peer_id, listed in self._listed.items() if listed.until_s == math.inf]
        others = [peer_id for peer_id in now if peer_id != self._peer_id]
        return sorted(others, key=lambda peer_id: (self._holders.rests(peer_id), peer_id != first))

    def rests(self, holder: str) -> bool:
        return self._holders.rests(holder)

    def too_slow(self, holder: str) -> None:
        self._holders.failed(holder)

    async def reconnected(self, timeout_s: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._coordinator.is_up.wait()
        if self._error is not None:
            raise SwarmUnreachable(str(self._error))

    async def _from_coordinator(self, digest: Digest, n_bytes: int, purpose: TrafficKind) -> bytes:
        if self._error is not None:
            raise SwarmUnreachable(str(self._error))
        return await self._downloads.get(digest, n_bytes, purpose)

    def _list(self, members: dict[str, tuple[str, ...]]) -> None:
        """Takes over the coordinator's list; who is not on it any more stays for a while."""
        now_s = time.monotonic()
        left = {
            peer_id: replace(listed, until_s=min(listed.until_s, now_s + _GRACE_S))
            for peer_id, listed in self._listed.items()
            if listed.until_s > now_s
        }
        self._listed = left | {p: _Listed(addresses, math.inf) for p, addresses in members.items()}
        self._holders.keep_only(self._listed)

    def _is_member(self, peer_id: str) -> bool:
        listed = self._listed.get(peer_id)
        return listed is not None and time.monotonic() < listed.until_s

    async def _open_stream_to(self, holder: str) -> Stream:
        if not self._is_member(holder):
            raise _Unlisted(f"{holder} is not connected to the swarm")
        return await self._coordinator.open_stream_to(holder, self._listed[holder].addresses, BLOB)

    async def _serve_blobs(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Members of the swarm may fetch what this node has."""
        if self._streams_of[peer_id] >= _STREAMS_PER_MEMBER:
            return
        self._streams_of[peer_id] += 1
        stream = Stream(reader, writer, self._meter, None if self._limit is None else self._limit.served)
        try:
            await serve_blobs(
                stream, self.served, self.served.purpose, lambda: self._is_member(peer_id), self._turns
            )
        except (OSError, EOFError, BadMessage, SwarmUnreachable):
            return  # the other node notices by itself
        finally:
            self._streams_of -= Counter((peer_id,))

    # ----------------------------------------------------------------------------- what the session asks

    def _known_head(self) -> tuple[int | None, Digest | None]:
        copy = self._copy
        return (copy.head_round, copy.head_digest) if copy.head_round else (None, None)

    def _missing(self, after: int, up_to: int) -> Iterator[Commit]:
        """Commits that the coordinator has lost, for as long as the copy is open."""
        while after < up_to and (batch := self._copy.commits(after, min(_RETURNED_AT_ONCE, up_to - after))):
            yield from batch
            after += len(batch)

    def _connected(self, welcome: Welcome) -> None:
        self.head = max(self.head, welcome.head_round)

    def _greeting(self) -> list[Message]:
        said: list[Message] = [Follow(after=self._copy.head_round)]
        if self._state is not NodeState.JOINING or self._needs_after is not None:
            said.append(State(state=self._state, needs_after=self._needs_after))
        said += self._reports
        if self._offer is not None:
            asyncio.get_running_loop().call_soon(self._resend_offer)
        return said

    def _resend_offer(self) -> None:
        if self._offer is not None:
            self._send_offer(self._offer)

    async def _received(self, message: Message) -> None:
        match message:
            case Commit():
                self._commit(message)
            case Heartbeat(round=round_):
                self.head = max(self.head, round_)
            case Head():
                self._coordinator.was_read.set()
            case Offered():
                if self._state is NodeState.TRAINING and message.round > self._copy.head_round:
                    self.payloads.offered(message)
            case Members(members=members):
                self._list({m.peer_id: m.addresses for m in members})
            case Notice(text=text, warning=warning):
                self._mailbox.put_event(text, warning)
            case AskMetrics():
                if self._answering is None or self._answering.done():
                    self._answering = asyncio.ensure_future(self._say_metrics())
            case _:
                raise BadMessage(f"{type(message).__name__} is not for a node")

    async def _say_metrics(self) -> None:
        try:
            text = await asyncio.to_thread(self._metrics)
        except Exception:  # noqa: BLE001 - the edge: a gauge that cannot be read must not end the session
            _log.exception("this node's metrics cannot be read")
            text = b""
        self._coordinator.post(packed(text))

    def _heartbeat(self) -> Heartbeat:
        sent, received = self._meter.totals()
        return Heartbeat(
            round=self._taken or 0,
            sent_bytes=sent,
            received_bytes=received,
            payload_bytes=self._payload_bytes,
            phases=self._phases(),
        )

    def _refused(self) -> None:
        # Whatever it was, it must not be sent again and again.
        self._offer = None
        self._reports.clear()

    def _failed(self, error: ThinwireError) -> None:
        self._error = self._with_command(error) if isinstance(error, LedgerCorrupt) else error
        self._mailbox.fail(self._error)
        self._coordinator.is_up.set()  # wakes downloads, which look at the error


def _without_payload(offer: Offer) -> Offer:
    """As it is sent when the payload goes another way, or nowhere."""
    assert offer.payload is not None
    if len(offer.payload) <= INLINE_BYTES:
        return offer
    return offer.model_copy(update={"payload": None, "digest": digest_of(offer.payload)})
