"""A swarm of threads in one process: the coordinator's service under a lock, links that call it.

For tests and simulation. Messages are not encoded, but counted as if they were; offers can be lost or late
by script, in a way that does not depend on timing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import SwarmUnreachable
from ...coordinator.blobs import BlobStore
from ...coordinator.control.orders import CheckStrategy
from ...coordinator.ledger import Ledger
from ...coordinator.protocol.blob_streams import Base
from ...coordinator.protocol.chain import Chain
from ...coordinator.protocol.figures import wall_ms
from ...coordinator.protocol.messages import (
    INLINE_BYTES,
    MAX_ROUND,
    PROTOCOL_VERSION,
    Audit,
    Commit,
    Digest,
    Evaluation,
    GenesisBody,
    Heartbeat,
    Hello,
    Message,
    NodeState,
    Notice,
    Offer,
    OfferEntry,
    Report,
    State,
    Verdict,
    Welcome,
    digest_of,
    encode_message,
)
from ...coordinator.protocol.trust.audits import sign_audit
from ...coordinator.quorum.log import Log
from ...coordinator.service import Service
from ...optim.registry import check_changes
from ..gossip.base import NeighbourLink
from ..gossip.local import LocalBoard, LocalNeighbours
from .base import Lied, LinkEvent, Shelf, Traffic
from .payloads import PayloadCache, Served


class Clock(Protocol):
    """The time of a swarm, and how its threads wait for it: always with the swarm's condition held."""

    def now_s(self) -> float: ...

    def wait(self, changed: threading.Condition, until_s: float | None) -> None:
        """Until something has changed or it is that late, or a little earlier."""
        ...

    def notify(self, changed: threading.Condition) -> None:
        """Something has changed: everybody looks again."""
        ...


class Monotonic:
    """The machine's own clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wait(self, changed: threading.Condition, until_s: float | None) -> None:
        changed.wait(None if until_s is None else max(0.0, until_s - time.monotonic()))

    def notify(self, changed: threading.Condition) -> None:
        changed.notify_all()


Script = Callable[[str, int], bool]
"""(peer id, round) -> whether the fault happens to that peer's offer."""

T = TypeVar("T")

TOKEN = "local"
BATCH = 64


class LocalSwarm:
    """One run: a `Service`, a thread that gives it the time, and the links that `link` makes.

    `lose`: the offer never arrives; `late`: it arrives when its round has been committed. In both cases
    nobody waits for it. The same offers count in every execution, but for the evaluator's, which nobody
    waits for either. An offer of somebody must get through: there are no empty commits.
    """

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        key: Ed25519PrivateKey,
        *,
        lose: Script = lambda _peer, _round: False,
        late: Script = lambda _peer, _round: False,
        clock: Clock | None = None,
        check_strategy: CheckStrategy = check_changes,
        log: Log | None = None,
    ) -> None:
        self.clock = clock or Monotonic()
        self.changed = threading.Condition(threading.RLock())
        """Guards the service and everything below; notified when something happened."""
        self.ledger, self.run_id = ledger, ledger.run_id
        self.blobs = blobs
        self.lose, self._is_late = lose, late
        self._late: list[tuple[LocalLink, int, Offer]] = []
        self._travelling: dict[str, tuple[float, LocalLink, int, Offer]] = {}
        """By peer: when its offer arrives, over a link that takes its time."""
        self._links: dict[str, LocalLink] = {}
        self._sessions = count(1)
        self._is_closed = False
        self.board = LocalBoard(lambda peer_id: self.link_of(peer_id) is not None)
        self.service = Service(
            ledger=ledger,
            blobs=blobs,
            key=key,
            token=TOKEN,
            send=self._send,
            on_commit=lambda _round: None,
            now_s=self.clock.now_s(),
            wall_ms=wall_ms,
            check_strategy=check_strategy,
            log=log,
        )
        self._pump = threading.Thread(target=self._keep_time, name="local-swarm", daemon=True)
        self._pump.start()

    def link(self, peer_id: str, token: str = TOKEN, upload_bytes_per_s: float | None = None) -> LocalLink:
        """A link that is not open yet. `upload_bytes_per_s`: its payloads take their time."""
        return LocalLink(self, peer_id, token, upload_bytes_per_s)

    def call(self, what: Callable[[Service, float], T]) -> T:
        """Runs `what(service, now_s)` alone; everybody who waits looks again afterwards."""
        with self.changed:
            if self._is_closed:
                raise SwarmUnreachable("the local swarm is closed")
            now_s = self.clock.now_s()
            try:
                return what(self.service, now_s)
            finally:
                self._deliver_late(now_s)
                self.service.tick(now_s)
                self.clock.notify(self.changed)

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Holding `changed`."""
        while not condition():
            self.clock.wait(self.changed, None)

    def travel(self, link: LocalLink, session: int, offer: Offer, arrives_s: float) -> None:
        """The offer comes in then, unless the peer has made another one by that time."""
        with self.changed:
            self._travelling[link.peer_id] = (arrives_s, link, session, offer)
            self.clock.notify(self.changed)

    def offer(self, link: LocalLink, session: int, offer: Offer) -> None:
        """Brings an offer in, unless the script says otherwise."""
        if self.lose(link.peer_id, offer.round):
            self.call(lambda service, now_s: service.excuse(link.peer_id, offer.round, now_s))
        elif self._is_late(link.peer_id, offer.round):
            with self.changed:
                self._late.append((link, session, offer))
            self.call(lambda service, now_s: service.excuse(link.peer_id, offer.round, now_s))
        else:
            self.call(lambda service, now_s: service.receive(link.peer_id, session, offer, now_s))

    def new_session(self) -> int:
        return next(self._sessions)

    def attach(self, link: LocalLink) -> None:
        """From now on the peer's messages go to this link."""
        self._links[link.peer_id] = link

    def link_of(self, peer_id: str) -> LocalLink | None:
        """The peer's link, while its session is open."""
        with self.changed:
            link = self._links.get(peer_id)
            return link if link is not None and link.is_open else None

    def members(self) -> list[str]:
        """Peers whose sessions are open."""
        with self.changed:
            return [peer_id for peer_id, link in self._links.items() if link.is_open]

    def close(self) -> None:
        """Closes every link and ends the thread."""
        for link in list(self._links.values()):
            link.close()
        with self.changed:
            self._is_closed = True
            self.clock.notify(self.changed)
        self._pump.join()

    def _send(self, peer_id: str, message: Message) -> None:
        link = self._links.get(peer_id)
        if link is not None:
            link.deliver(message)

    def _deliver_late(self, now_s: float) -> None:
        due = [entry for entry in self._late if entry[2].round <= self.service.head]
        self._late = [entry for entry in self._late if entry not in due]
        for link, session, offer in due:
            self.service.receive(link.peer_id, session, offer, now_s)

    def _keep_time(self) -> None:
        heartbeat_s = 1.0
        next_beat_s = 0.0
        with self.changed:
            while not self._is_closed:
                now_s = self.clock.now_s()
                if now_s >= next_beat_s:
                    next_beat_s = now_s + heartbeat_s
                    for link in self._links.values():
                        link.beat(now_s)
                self._deliver_late(now_s)
                for peer_id in [p for p, (due_s, *_) in self._travelling.items() if due_s <= now_s]:
                    _, link, session, offer = self._travelling.pop(peer_id)
                    link.arrive(session, offer)
                arrivals = [due_s for due_s, *_ in self._travelling.values()]
                wake_s = min(self.service.tick(now_s), next_beat_s, *arrivals)
                self.clock.notify(self.changed)
                self.clock.wait(self.changed, wake_s)


class LocalLink:
    """`Link` by method calls; see the contract for what each method does."""

    def __init__(
        self, swarm: LocalSwarm, peer_id: str, token: str, upload_bytes_per_s: float | None = None
    ) -> None:
        self.peer_id = peer_id
        self.run_id = swarm.run_id
        self._kept = PayloadCache()
        self._served = Served(self._kept)
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._swarm = swarm
        self._token = token
        self._upload_bytes_per_s = upload_bytes_per_s
        self._session: int | None = None
        self._is_closed = False
        self._events: deque[LinkEvent] = deque(maxlen=1000)
        self._peers: dict[int, str] = {}
        self._applied = 0
        limit = swarm.ledger.genesis.limits.max_payload_bytes
        self._neighbours = LocalNeighbours(swarm.board, peer_id, limit, self._count_neighbours)
        self.neighbours: NeighbourLink | None = self._neighbours

    @property
    def head(self) -> int:
        return self._swarm.service.head

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def open(self) -> Welcome:
        hello = Hello(
            version=PROTOCOL_VERSION,
            run_id=self.run_id,
            token=self._token,
            head_round=None,
            head_digest=None,
            addresses=(),
            agent="thinwire local",
        )
        self._count(self.sent, "control", hello)
        welcome = self._swarm.call(lambda service, now_s: self._enter(service, hello, now_s))
        self._count(self.received, "control", welcome)
        return welcome

    def state(self, state: NodeState, needs_after: int | None = None, last_word: str = "") -> None:
        self._tell(State(state=state, needs_after=needs_after, last_word=last_word))

    def offer(self, offer: Offer) -> None:
        if offer.payload is None:
            raise ValueError("offer.payload carries the payload's bytes")
        session = self._session
        if session is None or self._is_closed:
            return
        if self._upload_bytes_per_s is None:
            self.arrive(session, offer)
        else:
            takes_s = len(offer.payload) / self._upload_bytes_per_s
            self._swarm.travel(self, session, offer, self._swarm.clock.now_s() + takes_s)

    def arrive(self, session: int, offer: Offer) -> None:
        """The offer and its payload are at the coordinator."""
        payload = offer.payload
        if payload is None or self._is_closed:
            return
        self.sent["payload"] += len(payload)
        if len(payload) > INLINE_BYTES:
            digest = digest_of(payload)
            self._keep(offer.round, digest, payload)
            self._swarm.call(lambda service, now_s: self._upload(service, digest, payload, now_s))
            offer = offer.model_copy(update={"payload": None, "digest": digest})
            self._count(self.sent, "control", offer)
        else:
            self.sent["control"] += len(encode_message(offer)) - len(payload)
        self._swarm.offer(self, session, offer)

    def records(self, after: int) -> Iterator[Commit]:
        yield from self._read(after, self.head)

    def commits(self, after: int) -> Iterator[Commit]:
        for commit in self._read(after, MAX_ROUND):
            self._applied = commit.body.round
            yield commit

    def payload(self, offer: OfferEntry) -> bytes:
        if offer.digest is None:
            assert offer.payload is not None
            return offer.payload
        with self._swarm.changed:
            kept = self._kept.get(offer.digest)
        if kept is not None:
            return kept
        payload = self._from_anybody(offer.digest, offer.n_bytes, self._peers.get(offer.peer))
        self._keep(self._applied, offer.digest, payload)
        return payload

    def fetch(
        self, digest: Digest, n_bytes: int, holder: str | None = None, base: Base | None = None
    ) -> bytes:
        return self._fetch(digest, n_bytes, holder, "snapshot")

    def keep_payloads(self, after: int) -> None:
        with self._swarm.changed:
            self._kept.keep_after(after)

    def has_payload(self, digest: Digest) -> bool:
        return digest in self._kept

    def members(self) -> list[str]:
        return [peer_id for peer_id in self._swarm.members() if peer_id != self.peer_id]

    def serve(self, shelf: Shelf | None) -> None:
        self._served.shelf = shelf

    def report(self, report: Report | Evaluation) -> None:
        self._tell(report)

    def audit(self, round_: int, target: int, verdict: Verdict, claim: bytes) -> None:
        signature = sign_audit(None, claim)
        self._tell(Audit(round=round_, target=target, verdict=verdict, signature=signature))

    def events(self) -> Iterator[LinkEvent]:
        while True:
            with self._swarm.changed:
                self._swarm.wait_for(lambda: self._events or self._is_closed)
                if not self._events:
                    return
                event = self._events.popleft()
            yield event

    def traffic(self) -> Traffic:
        with self._swarm.changed:
            return Traffic(dict(self.sent), dict(self.received), self._upload_bytes_per_s)

    def close(self) -> None:
        self._tell(State(state=NodeState.LEAVING))
        self.kill()

    def kill(self) -> None:
        """Ends the session as a crash of the node does: without a word."""
        with self._swarm.changed:
            self._is_closed = True
            session, self._session = self._session, None
            if session is not None:
                self._swarm.call(lambda service, now_s: service.closed(self.peer_id, session, now_s))
            self._swarm.clock.notify(self._swarm.changed)

    def sent_to_neighbours(self, until_round: int) -> int:
        """Bytes of messages for neighbours, of the rounds up to that one."""
        return self._neighbours.sent_until(until_round)

    def deliver(self, message: Message) -> None:
        """A message from the coordinator; called under the swarm's lock."""
        if not isinstance(message, Heartbeat):
            self._count(self.received, "control", message)
        match message:
            case Notice(text=text, warning=warning):
                self._events.append(LinkEvent(text, warning))
            case _:
                pass

    def beat(self, now_s: float) -> None:
        """A heartbeat, under the swarm's lock."""
        if self._session is None:
            return
        beat = Heartbeat(
            round=self._applied,
            sent_bytes=self.sent.total(),
            received_bytes=self.received.total(),
            payload_bytes=self.sent["payload"],
        )
        self._swarm.service.receive(self.peer_id, self._session, beat, now_s)

    def _tell(self, message: Message) -> None:
        session = self._session
        if session is None or self._is_closed:
            return
        with self._swarm.changed:
            self._count(self.sent, "control", message)
            self._swarm.call(lambda service, now_s: service.receive(self.peer_id, session, message, now_s))

    def _enter(self, service: Service, hello: Hello, now_s: float) -> Welcome:
        session = self._swarm.new_session()
        welcome = service.open(self.peer_id, session, hello, now_s)
        self._session = session
        self._swarm.attach(self)
        return welcome

    def _upload(self, service: Service, digest: Digest, payload: bytes, now_s: float) -> None:
        if digest not in self._swarm.blobs:
            service.may_store(self.peer_id, len(payload))
            self._swarm.blobs.put(digest, payload)
        service.blob_arrived(self.peer_id, digest, now_s)

    def _next_commits(self, after: int) -> list[Commit]:
        """Blocks; empty once the link is closed."""
        with self._swarm.changed:
            self._swarm.wait_for(lambda: self._is_closed or self.head > after)
            return [] if self._is_closed else self._swarm.service.commits(after, BATCH)

    def _read(self, after: int, up_to: int) -> Iterator[Commit]:
        """The copy of the ledger that a link has is the swarm's own here."""
        genesis, before = self._swarm.ledger.genesis, self._swarm.ledger.committees(after)
        chain = Chain(self.run_id, genesis.coordinator, after, recovery=genesis.recovery, before=before)
        while chain.round < up_to and (batch := self._next_commits(chain.round)):
            for commit in batch[: up_to - chain.round]:
                if self._is_closed:
                    return
                chain.check(commit)
                self._peers.update((a.index, a.peer_id) for a in commit.body.admitted)
                self._count(self.received, "ledger", commit)
                yield commit

    def give(self, digest: Digest, kind: str) -> bytes:
        """What another link asks for. Raises KeyError: it is not served here."""
        with self._swarm.changed:
            file, _ = self._served.open(digest)
        with file:
            blob = file.read()
        with self._swarm.changed:
            self.sent[kind] += len(blob)
        return blob

    def _keep(self, round_: int, digest: Digest, payload: bytes) -> None:
        with self._swarm.changed:
            self._kept.add(round_, digest, payload)

    def _from_anybody(self, digest: Digest, n_bytes: int, offerer: str | None) -> bytes:
        """The coordinator, then every member in turn."""
        holders = sorted(self.members(), key=lambda peer_id: peer_id != offerer)
        for holder in (None, *holders):
            try:
                return self._fetch(digest, n_bytes, holder, "payload")
            except SwarmUnreachable:
                continue
        raise SwarmUnreachable(f"nobody has the payload {digest.hex()[:16]} any more")

    def _fetch(self, digest: Digest, n_bytes: int, holder: str | None, kind: str) -> bytes:
        where = holder or "the coordinator"
        if self._session is None:
            raise SwarmUnreachable("the link is not open")
        try:
            blob = self._from_coordinator(digest) if holder is None else self._from(holder, digest, kind)
        except KeyError:
            raise SwarmUnreachable(f"{where} does not serve blob {digest.hex()[:16]}") from None
        if len(blob) > n_bytes or digest_of(blob) != digest:
            raise Lied(f"{where} gave other bytes than those of blob {digest.hex()[:16]}")
        with self._swarm.changed:
            self.received[kind] += len(blob)
        return blob

    def _from_coordinator(self, digest: Digest) -> bytes:
        with self._swarm.changed:
            return self._swarm.blobs.read(digest)

    def _from(self, holder: str, digest: Digest, kind: str) -> bytes:
        link = self._swarm.link_of(holder)
        if link is None:
            raise SwarmUnreachable(f"{holder} is not connected to the swarm")
        return link.give(digest, kind)

    def _count_neighbours(self, sent: int, received: int) -> None:
        self.sent["gossip"] += sent
        self.received["gossip"] += received

    def _count(self, counter: Counter[str], kind: str, message: Message) -> None:
        counter[kind] += len(encode_message(message))


@contextmanager
def local_swarm(
    folder: Path,
    genesis: GenesisBody,
    key: Ed25519PrivateKey,
    *,
    blobs: Iterable[bytes] = (),
    lose: Script = lambda _peer, _round: False,
    late: Script = lambda _peer, _round: False,
    clock: Clock | None = None,
    log: Callable[[Ledger], Log] | None = None,
) -> Iterator[LocalSwarm]:
    """A new run in an empty folder, or the one that is in it. `blobs`: base weights and texts of the run;
    `log`: None: its coordinator orders it alone."""
    path = folder / "ledger.db"
    ledger = Ledger.open(path, key.public_key()) if path.exists() else Ledger.create(path, genesis, key)
    store = BlobStore(folder / "blobs")
    for blob in blobs:
        store.put(digest_of(blob), blob)
    ordered = None if log is None else log(ledger)
    swarm = LocalSwarm(ledger, store, key, lose=lose, late=late, clock=clock, log=ordered)
    try:
        yield swarm
    finally:
        swarm.close()
        ledger.close()
