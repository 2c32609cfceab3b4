"""A node, reduced to what the swarm agrees on: the rules of the link, and a replica of 32 bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.simulation.oracle import first_state, next_state
from thinwire.coordinator.protocol.attested import Snapshots
from thinwire.coordinator.protocol.chain import Chain
from thinwire.coordinator.protocol.messages import (
    INLINE_BYTES,
    PROTOCOL_VERSION,
    Commit,
    Follow,
    Heartbeat,
    Hello,
    Message,
    NodeState,
    Offer,
    Refused,
    Report,
    State,
    Welcome,
    digest_of,
)
from thinwire.coordinator.protocol.trust.signed_offers import signed
from thinwire.coordinator.protocol.trust.standing import Standing

KEPT_REPORTS = 4
BLOB_BYTES = 5000


class End:
    """The last thing that comes out of a connection."""


@dataclass(eq=False)
class Wire:
    """One connection, in order within each direction; uploads have streams of their own.

    `number` is the session's, 0 before it is open; `follows`: the commits after this round are on their way.
    """

    peer: Peer
    number: int = 0
    up: deque[Message | End] = field(default_factory=deque)
    down: deque[Message | End] = field(default_factory=deque)
    uploads: deque[tuple[bytes, bytes]] = field(default_factory=deque)
    follows: int | None = None
    is_ending: bool = False
    is_closed: bool = False
    """At the coordinator's end."""


@dataclass
class Disk:
    """What survives a crash of the node: every commit that it has seen, and its snapshots by round."""

    copy: list[Commit] = field(default_factory=list)
    snapshots: dict[int, bytes] = field(default_factory=dict)


class Peer:
    """One life of a node. `fetch`: a payload from whoever has it; `borrow`: the state of an attested
    snapshot from a peer that holds it; None: nobody. `key`: of one whose name is its peer id, and which
    signs its offers."""

    def __init__(
        self,
        name: str,
        life: int,
        disk: Disk,
        run_id: bytes,
        founder: str,
        snapshot_every: int,
        n_rounds: int,
        fetch: Callable[[bytes], bytes | None],
        borrow: Callable[[int, bytes], bytes | None],
        key: Ed25519PrivateKey | None = None,
    ) -> None:
        self.name, self.life, self.disk, self.run_id = name, life, disk, run_id
        self._snapshot_every, self._n_rounds = snapshot_every, n_rounds
        self._fetch, self._borrow, self._key = fetch, borrow, key
        head = disk.copy[-1].digest if disk.copy else None
        bodies = (commit.body for commit in disk.copy)
        self._chain = Chain(run_id, founder, len(disk.copy), head, before=bodies)
        self.wire: Wire | None = None
        self.index: int | None = None
        self.is_frozen = False
        self.is_slow = False
        """Applies nothing for now, though its heart beats."""
        self.refused: str | None = None
        """What no retry can mend: this life is over."""
        self.state = NodeState.JOINING
        self.start: int | None = None
        self.round, self.replica = 0, first_state(run_id)
        self.payloads: dict[bytes, bytes] = {}
        self._head = 0
        self._offer: tuple[Offer, bytes] | None = None
        self._reports: list[Report] = []

    # ------------------------------------------------------------------------------------ the connection

    def connect(self, wire: Wire) -> None:
        self.wire = wire
        known = bool(self.disk.copy)
        wire.up.append(
            Hello(
                version=PROTOCOL_VERSION,
                run_id=self.run_id,
                token="secret",
                head_round=len(self.disk.copy) if known else None,
                head_digest=self._chain.digest if known else None,
                addresses=("/ip4/127.0.0.1/tcp/1",),
                agent="simulated",
            )
        )

    def say(self, message: Message) -> None:
        """Dropped without a connection: its successor hears a greeting."""
        if self.wire is not None and self.index is not None:
            self.wire.up.append(message)

    def receive(self, message: Message | End) -> None:
        match message:
            case End():
                self.wire = self.index = None
            case Welcome():
                self._welcomed(message)
            case Follow(after=after):
                assert self.wire is not None
                self.wire.up.extend(self.disk.copy[after:])
            case Commit():
                self._commit(message)
            case Refused(error=error):
                self._refused(error)
            case _:
                pass  # for people and for prefetching

    def _welcomed(self, welcome: Welcome) -> None:
        self.index, self._head = welcome.peer_index, welcome.head_round
        assert welcome.head_round >= len(self.disk.copy), "the coordinator lacks commits that this node has"
        self.say(Follow(after=len(self.disk.copy)))
        if self.state is NodeState.TRAINING or self.start is not None:
            self._say_state(self.state)
        for report in self._reports:
            self.say(report)
        if self._offer is not None:
            self._send_offer(*self._offer)

    def _refused(self, error: str) -> None:
        if error == "BadMessage":  # must not be sent again and again
            self._offer, self._reports = None, []
        elif error != "SwarmUnreachable":
            self.refused = error

    def _commit(self, commit: Commit) -> None:
        self._chain.check(commit)
        self.disk.copy.append(commit)
        self._head = max(self._head, len(self.disk.copy))
        if self._offer is not None and self._offer[0].round <= len(self.disk.copy):
            self._offer = None

    # ------------------------------------------------------------------------------------------ the work

    def work(self, whose: str, n_bytes: int) -> None:
        """Applies what is here, then makes an offer if it has made none for the round."""
        is_caught_up = self.index is not None and len(self.disk.copy) >= self._head
        if self.start is None:
            if not is_caught_up:
                return
            self._choose_start()
        while self.round < len(self.disk.copy):
            if self.is_slow or not self._apply(self.disk.copy[self.round]):
                if not self.is_slow:
                    self._choose_start()
                return
        if is_caught_up and self.state is NodeState.JOINING:
            self._say_state(NodeState.TRAINING)
        round_ = self.round + 1
        can_offer = self.state is NodeState.TRAINING and round_ <= self._n_rounds
        if can_offer and self._offer is None:
            self.offer(round_, payload_of(f"{whose} {round_}", n_bytes))

    def _choose_start(self) -> None:
        """The newest state that can be had: this one, an own snapshot, an attested one."""
        standing = Standing()
        snapshots = Snapshots(self._snapshot_every, standing)
        for commit in self.disk.copy:
            standing.committed(commit.body)
            snapshots.committed(commit.body)
        found = {round_: state for round_, state in self.disk.snapshots.items() if round_ > self.round}
        for attested in snapshots.attested():
            state = self._borrow(attested.round, attested.manifest)
            if state is not None and attested.round > self.round:
                found[attested.round] = state
        if found:
            self.round = max(found)
            self.replica = found[self.round]
        self.start = self.round
        if self.state is NodeState.JOINING:
            self._say_state(NodeState.JOINING)

    def _apply(self, commit: Commit) -> bool:
        """False: a payload cannot be had now."""
        payloads = []
        for entry in commit.body.offers:
            payload = entry.payload
            if payload is None and entry.digest is not None:
                payload = self.payloads.get(entry.digest) or self._fetch(entry.digest)
            if payload is None:
                return False
            self.payloads[digest_of(payload)] = payload
            payloads.append(payload)
        self.replica = next_state(self.replica, commit.body, payloads)
        self.round = commit.body.round
        self._report(evaluates=self.index is not None and commit.body.evaluator == self.index)
        return True

    def _report(self, evaluates: bool) -> None:
        keeps = self.round % self._snapshot_every == 0
        if keeps:
            self.disk.snapshots[self.round] = self.replica
        report = Report(
            round=self.round,
            fingerprint=self.replica[:8],
            held_out=1.0 if evaluates else None,
            snapshot=manifest(self.round, self.replica) if keeps else None,
            snapshot_bytes=32 if keeps else None,
        )
        self._reports = [*self._reports, report][-KEPT_REPORTS:]
        self.say(report)

    def offer(self, round_: int, payload: bytes, n_bytes: int | None = None) -> None:
        """Kept and sent again after a reconnect until its round is committed."""
        inline = len(payload) <= INLINE_BYTES
        offer = Offer(
            round=round_,
            n_samples=1 + self.life,
            n_tokens=10,
            loss=1.0,
            n_bytes=len(payload) if n_bytes is None else n_bytes,
            payload=payload if inline else None,
            digest=None if inline else digest_of(payload),
        )
        if self._key is not None:
            offer = signed(offer, self.run_id, self._key)
        self._offer = offer, payload
        self._send_offer(offer, payload)

    def lie(self, round_: int, payload: bytes) -> None:
        """An offer that says another size than the blob has."""
        if self._offer is None:
            self.offer(round_, payload, n_bytes=len(payload) - 1)

    def resend(self) -> None:
        """The same once more, as if it had not been heard."""
        if self._offer is not None:
            self._send_offer(*self._offer)

    def _send_offer(self, offer: Offer, payload: bytes) -> None:
        self.say(offer)
        if offer.digest is not None:
            self.payloads[offer.digest] = payload
            if self.wire is not None and self.index is not None:
                self.wire.uploads.append((offer.digest, payload))

    def _say_state(self, state: NodeState) -> None:
        self.state = state
        self.say(State(state=state, needs_after=self.start if state is NodeState.JOINING else None))

    def leave(self) -> None:
        self._say_state(NodeState.LEAVING)

    def beat(self) -> None:
        self.say(Heartbeat(round=self.round, sent_bytes=0, received_bytes=0, payload_bytes=0))


def manifest(round_: int, replica: bytes) -> bytes:
    """The digest that names a snapshot."""
    return digest_of(f"snapshot of round {round_}".encode() + replica)


def payload_of(text: str, n_bytes: int) -> bytes:
    """Bytes that begin with `text`."""
    return text.encode().ljust(n_bytes, b".")
