"""What a link does in its event loop: it says what the node says, and hears what the coordinator says."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import LedgerCorrupt, SwarmUnreachable, ThinwireError
from ...coordinator.protocol.exposition import packed
from ...coordinator.protocol.ledger_copy import LedgerCopy
from ...coordinator.protocol.messages import (
    AskMetrics,
    Audit,
    BadMessage,
    Commit,
    Digest,
    Evaluation,
    Follow,
    Gossiping,
    Head,
    Heartbeat,
    Members,
    Message,
    NodeState,
    Notice,
    Offer,
    Offered,
    PeerSize,
    Phases,
    Report,
    State,
    Welcome,
)
from ...coordinator.protocol.streams import BLOB, GOSSIP, Meter, Stream
from ...coordinator.protocol.ticket import Ticket
from ...coordinator.protocol.trust.signed_offers import signed
from ..gossip.carrying import Signer
from ..gossip.streams import NeighbourStreams
from .blob_client import BlobClient
from .blob_fetcher import BlobFetcher
from .blob_server import BlobServer
from .commit_feed import CommitFeed
from .connecting.connecting import OpenTransport
from .coordinator_session import CoordinatorSession
from .known_seats import KnownSeats
from .mailbox import Mailbox
from .members import MemberList
from .offers import OfferSender
from .payloads import Payloads, Served
from .upload_limit import UploadLimit

_log = logging.getLogger("thinwire.link")

_KEPT_REPORTS = 8
_KEPT_AUDITS = 64


@dataclass(frozen=True, slots=True)
class About:
    """What people are told of a node: what it trains on (called with every Hello); how long the parts of its
    rounds take, how large it has seen some peers' payloads, and how its model mixes (with every heartbeat):
    all in the link's thread. `agent`: see `Hello`."""

    device: Callable[[], str] = str
    phases: Callable[[], Phases | None] = lambda: None
    sizes: Callable[[], tuple[PeerSize, ...]] = tuple
    gossip: Callable[[], Gossiping | None] = lambda: None
    agent: str = "thinwire"


class LinkCore:
    """The `SessionHandler` of a node's session with its coordinator. Lives in the event loop.

    Its parts: `commits` that are followed, `offers` that are made, `blobs` that are fetched, what is
    `served`, payloads that are `kept` or `not_taken`, and `neighbours` in gossip. Of these `commits.head`,
    `commits.taken`, `kept.__contains__`, `kept.get`, `not_taken`, `offers.upload_bytes_per_s`,
    `blobs.members` and `served.shelf` are used from any thread.

    `copy_path`: where the copy of the ledger is on disk, if it is. `key`, `metrics`: see `RemoteLink`.
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
        key: Ed25519PrivateKey | None = None,
        metrics: Callable[[], bytes] = bytes,
        about: About = About(),
    ) -> None:
        self._mailbox, self._meter = mailbox, meter
        self._run_id, self._key = ticket.run_id, key
        self._copy_path, self._metrics, self._about = copy_path, metrics, about
        self._seats = KnownSeats(ticket, copy.seats)
        coordinator = self._coordinator = CoordinatorSession(
            ticket, self._seats, open_transport, meter, self, patience_s, limit, about.device, about.agent
        )
        self._members = MemberList()
        self._uploads = BlobClient(
            lambda: coordinator.open_stream(BLOB, None if limit is None else limit.own), 1
        )
        self.blobs = BlobFetcher(coordinator, self._members, peer_id, self._seats)
        self._payloads = Payloads(self.blobs, peer_id)
        self.kept, self.not_taken = self._payloads.kept, self._payloads.refused
        rate = inf if limit is None else limit.rate_bytes_per_s
        self.served = Served(self.kept, rate, self._payloads)
        throttle = None if limit is None else limit.served
        self._server = BlobServer(self.served, self._members, meter, throttle, self._seats)
        signer = Signer(peer_id, ticket.run_id, key)
        self.neighbours = NeighbourStreams(self._to_neighbour, self._members, signer, meter, throttle)
        self.commits = CommitFeed(copy, self._payloads, mailbox)
        self.offers = OfferSender(coordinator, self._uploads, self._payloads, mailbox)
        self._state = NodeState.JOINING
        self._needs_after: int | None = None
        self._reports: deque[Report | Evaluation] = deque(maxlen=_KEPT_REPORTS)
        self._audits: deque[Audit] = deque(maxlen=_KEPT_AUDITS)
        self._answering: asyncio.Task[None] | None = None

    async def open(self) -> Welcome:
        """See `Link.open`."""
        try:
            welcome = await self._coordinator.open()
        except LedgerCorrupt as e:
            raise self._with_command(e) from e
        self.keep_record_0(welcome)
        self.commits.heard_of(welcome.head_round)
        limits = welcome.body.limits
        self._payloads.max_offers, self._payloads.max_bytes = limits.max_peers, limits.max_payload_bytes
        self.neighbours.inbox.max_bytes = limits.max_payload_bytes
        return welcome

    async def close(self, say_goodbye: bool) -> None:
        """Ends the session and all streams; without a goodbye as a crash would."""
        if say_goodbye and self._state is not NodeState.LEAVING:
            self.say_state(NodeState.LEAVING, None)
        await self._coordinator.close(say_goodbye=say_goodbye)
        self._uploads.close()
        self.neighbours.close()
        self.blobs.close()
        self._payloads.close()

    # ------------------------------------------------------------------------------ what the node says

    def say_state(self, state: NodeState, needs_after: int | None, last_word: str = "") -> None:
        self._state, self._needs_after = state, needs_after
        self._coordinator.post(State(state=state, needs_after=needs_after, last_word=last_word))

    def make_report(self, report: Report | Evaluation) -> None:
        self._reports.append(report)
        self._coordinator.post(report)

    def make_audit(self, audit: Audit) -> None:
        self._audits.append(audit)
        self._coordinator.post(audit)

    def make_offer(self, offer: Offer) -> None:
        if self._key is not None:
            offer = signed(offer, self._run_id, self._key)
        self.offers.make(offer, self.commits.copied_round)

    # ---------------------------------------------------------- what the session asks (see SessionHandler)

    def known_head(self) -> tuple[int | None, Digest | None]:
        return self.commits.known_head()

    def over_after(self) -> int | None:
        return self.commits.over_after()

    def missing_commits(self, after: int, up_to: int) -> Iterator[Commit]:
        return self.commits.missing(after, up_to)

    def keep_record_0(self, welcome: Welcome) -> None:
        self.commits.keep_genesis(welcome.genesis, welcome.signature)

    def connected(self, welcome: Welcome) -> None:
        self.commits.forget()
        self._payloads.reconnected()
        self.commits.heard_of(welcome.head_round)

    def greeting(self) -> list[Message]:
        said: list[Message] = [Follow(after=self.commits.copied_round)]
        if self._state is not NodeState.JOINING or self._needs_after is not None:
            said.append(State(state=self._state, needs_after=self._needs_after))
        said += [*self._reports, *self._audits]
        if self.offers.is_open:
            asyncio.get_running_loop().call_soon(self.offers.resend)
        return said

    def heartbeat(self) -> Heartbeat:
        sent, received = self._meter.totals()
        return Heartbeat(
            round=self.commits.taken_round,
            sent_bytes=sent,
            received_bytes=received,
            payload_bytes=self.offers.payload_bytes,
            phases=self._about.phases(),
            sizes=self._about.sizes(),
            gossip=self._about.gossip(),
        )

    def last_heard_s(self) -> float:
        return max(self._uploads.heard_s, self.blobs.heard_s)

    async def received(self, message: Message) -> None:
        match message:
            case Commit():
                self._took(self.commits.append(message))
            case Heartbeat(round=round_):
                self._took(self.commits.take())
                self.commits.heard_of(round_)
            case Head():
                self._coordinator.was_read.set()
            case Offered():
                if self._state is NodeState.TRAINING and message.round > self.commits.copied_round:
                    self._payloads.offered(message)
            case Members():
                self._members.heard(message)
                self.blobs.members_changed()
                self.neighbours.keep_only(self._members.all())
            case Notice(text=text, warning=warning):
                self.tell(text, warning)
            case AskMetrics():
                if self._answering is None or self._answering.done():
                    self._answering = asyncio.ensure_future(self._say_metrics())
            case _:
                raise BadMessage(f"{type(message).__name__} is not for a node")

    def _took(self, commits: Iterable[Commit]) -> None:
        for commit in commits:
            if commit.body.committee is not None:
                self._seats.name(commit.body.committee.seats)
        self.offers.committed(self.commits.copied_round)

    async def serve_blobs(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._server.serve(peer_id, reader, writer)

    async def serve_neighbours(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self.neighbours.serve(peer_id, reader, writer)

    def tell(self, text: str, warning: bool) -> None:
        self._mailbox.put_event(text, warning)

    def refused(self) -> None:
        # Whatever it was, it must not be sent again and again.
        self.offers.drop()
        self._reports.clear()
        self._audits.clear()

    def failed(self, error: ThinwireError) -> None:
        error = self._with_command(error) if isinstance(error, LedgerCorrupt) else error
        self.blobs.fail(error)
        self._mailbox.fail(error)
        self._coordinator.is_up.set()  # wakes downloads, which look at the error

    # ------------------------------------------------------------------------------------------- within

    async def _to_neighbour(self, peer_id: str) -> Stream:
        """Raises SwarmUnreachable."""
        addresses = self._members.addresses(peer_id)
        if addresses is None:
            raise SwarmUnreachable(f"{peer_id} is not connected to the swarm")
        return await self._coordinator.open_stream_to(peer_id, addresses, GOSSIP)

    async def _say_metrics(self) -> None:
        try:
            text = await asyncio.to_thread(self._metrics)
        except Exception:  # noqa: BLE001 - the edge: a gauge that cannot be read must not end the session
            _log.exception("this node's metrics cannot be read")
            text = b""
        self._coordinator.post(packed(text))

    def _with_command(self, error: LedgerCorrupt) -> LedgerCorrupt:
        """What is wrong and why, and what to do here if the coordinator's ledger is the one to go on with."""
        if self._copy_path is None:
            return LedgerCorrupt(f"{error} This node has no --state directory: start it again.")
        return LedgerCorrupt(f"{error} What this node has seen is in {self._copy_path}: rm it to give it up.")
