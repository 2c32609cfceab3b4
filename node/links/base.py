"""The contract of links: a node's view of its swarm.

Three implementations share one suite (`tests/contracts/test_link.py`): threads in one process, libp2p
through hivemind, Ray. A link never opens a payload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, Protocol

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.blob_streams import Base
from ...coordinator.protocol.messages import (
    Commit,
    Digest,
    Evaluation,
    NodeState,
    Offer,
    OfferEntry,
    Report,
    Verdict,
    Welcome,
)
from ..gossip.base import NeighbourLink

PayloadRefused = Literal["sender", "unannounced", "wrong", "slow"]
"""Why a payload that was sent here is not taken: not by the coordinator; without a word of it before; its
bytes do not fit; it had come from elsewhere before."""


class Lied(SwarmUnreachable):
    """A holder gave bytes that do not fit their digest."""


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """Something a person would want to read: what is being waited for, and how long already."""

    text: str
    warning: bool = False


class Shelf(Protocol):
    """Blobs that a node serves to members of its swarm, from any thread."""

    def open(self, digest: Digest) -> tuple[BinaryIO, int]:
        """The blob to read and its size. Raises KeyError: it is not here."""
        ...


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes so far, by kind (payload, snapshot, ledger, control); heartbeats are not counted.

    `upload_bytes_per_s`: how fast this node's own payloads reached the coordinator; None: not measured yet.
    `refused`: how many payloads were sent here and not taken, by why (`PayloadRefused`).
    """

    sent: dict[str, int]
    received: dict[str, int]
    upload_bytes_per_s: float | None = None
    refused: Mapping[str, int] = field(default_factory=dict)


class Link(Protocol):
    """One node's connection to one run: `open` once, then anything, `close` at the end.

    `fetch`, `members`, `serve`, `report`, `audit`, `records`, `payload`, `keep_payloads`, `has_payload`,
    `traffic` and `close` are called from any thread, the other methods from one. What is said before `open`
    or after `close` goes nowhere. A break is mended by the link itself: it tells of it in `events`, and says
    again what still matters.

    A link keeps every commit that it has seen, on disk where it has a folder: what is there is read from
    there, and given to a coordinator that has lost it.
    """

    peer_id: str
    """This node's, as the others know it."""
    run_id: bytes
    """BLAKE3 of record 0, 32 bytes; known from the ticket."""
    neighbours: NeighbourLink | None
    """Messages from node to node, for gossip; None: this network carries none."""

    def open(self) -> Welcome:
        """Connects, authenticates and returns record 0 and where the ledger stands.

        Raises SwarmUnreachable (with what every address answered), ConfigError (wrong token, a state folder
        that cannot be used), Incompatible (protocol version, or a full swarm) or LedgerCorrupt (the
        coordinator's ledger is not the one that this link has seen).
        """
        ...

    @property
    def head(self) -> int:
        """The newest round known to be committed; 0: none. What `commits` gives may be behind it."""
        ...

    def state(self, state: NodeState, needs_after: int | None = None, last_word: str = "") -> None:
        """Says what this node does: joining, training, leaving. `needs_after`: for one that joins, payloads
        of the rounds after this one are kept. `last_word`: for one that leaves, the error that ends it."""
        ...

    def offer(self, offer: Offer) -> None:
        """Returns at once; the offer is kept and resent after a reconnect until its round commits. A later
        offer takes its place.

        `offer.payload` carries the payload's bytes whatever their size: the link sends large ones as a blob.
        """
        ...

    def records(self, after: int) -> Iterator[Commit]:
        """Commits from round `after` + 1 up to the head that is known when this is called, to be looked at:
        no payload is fetched ahead. Blocks until they are here. Ends early, and raises, as `commits` does."""
        ...

    def commits(self, after: int) -> Iterator[Commit]:
        """Commits in order from round `after` + 1 on, verified (chain and signature), blocking for new ones.
        Their payloads are fetched ahead.

        Ends when `close` is called. Raises SwarmUnreachable when reconnecting was given up, LedgerCorrupt
        when a commit does not fit the chain.
        """
        ...

    def payload(self, offer: OfferEntry) -> bytes:
        """A counted offer's payload, from the commit itself or from whoever has it; waits for the
        coordinator's return. Raises SwarmUnreachable: nobody has it, or the link was closed."""
        ...

    def keep_payloads(self, after: int) -> None:
        """From now on payloads of the rounds after this one stay in this node's memory, as far as its quota
        allows, whatever the coordinator does with them."""
        ...

    def has_payload(self, digest: Digest) -> bool:
        """Whether this node has it in its memory."""
        ...

    def fetch(
        self, digest: Digest, n_bytes: int, holder: str | None = None, base: Base | None = None
    ) -> bytes:
        """The blob of at most `n_bytes`, verified; from `holder` (a peer id) or from the coordinator. `base`:
        an earlier version of it, of which a holder that has it, too, sends the differences alone.

        Raises SwarmUnreachable: not there, cut, stalled, or `Lied` (a subclass): bytes that do not fit."""
        ...

    def members(self) -> list[str]:
        """Peer ids of the others that are connected now."""
        ...

    def serve(self, shelf: Shelf | None) -> None:
        """From now on members may fetch what is on the shelf, beside the payloads that the link has itself.
        None: nothing."""
        ...

    def report(self, report: Report | Evaluation) -> None:
        """Fingerprint, held-out loss, snapshot; an evaluation. Returns at once."""
        ...

    def audit(self, round_: int, target: int, verdict: Verdict, claim: bytes) -> None:
        """What this node has found of the counted offer of the peer `target` (its index) in `round_`. Returns
        at once. The link signs the claim, which `audits.signed_bytes` makes, with the node's key."""
        ...

    def events(self) -> Iterator[LinkEvent]:
        """Blocks for the next thing worth telling; ends when `close` is called."""
        ...

    def traffic(self) -> Traffic:
        """Of this link so far."""
        ...

    def close(self) -> None:
        """Leaves the swarm, sends what is still pending for at most 5 s, wakes `commits` and `events`.
        Once more does nothing."""
        ...
