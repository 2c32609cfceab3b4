"""The contract of links: a node's view of its swarm (design: section 4).

Three implementations share one suite (`tests/contracts/test_link.py`): threads in one process, libp2p
through hivemind, Ray. A link never opens a payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from thinwire.coordinator.messages import Commit, NodeState, Offer, Report, Welcome

Digest = bytes
"""BLAKE3 of a blob, 32 bytes."""


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """Something a person would want to read: what is being waited for, and how long already."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """Where a snapshot can be fetched: the replica after `round`, its bytes named by `digest`."""

    round: int
    digest: Digest
    n_bytes: int
    holder: str  # peer id of the node that serves it


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes so far, by kind (payload, snapshot, ledger, control); heartbeats are not counted."""

    sent: dict[str, int]
    received: dict[str, int]


class Link(Protocol):
    """One node's connection to one run. Methods are called from one thread, `close` from any."""

    peer_id: str
    run_id: bytes
    """BLAKE3 of record 0, 32 bytes; known from the ticket."""

    def open(self, head_round: int | None, head_digest: Digest | None) -> Welcome:
        """Connects, authenticates and returns record 0 and where the ledger stands.

        `head_*`: the last commit that this node has applied, None for a new one.
        Raises SwarmUnreachable (with what every address answered), ConfigError (wrong token),
        Incompatible (protocol version, or a full swarm) or LedgerCorrupt (a head not on the chain).
        """
        ...

    @property
    def head(self) -> int:
        """The newest round known to be committed."""
        ...

    def state(self, state: NodeState) -> None:
        """Says what this node does: joining, training, leaving."""
        ...

    def offer(self, offer: Offer) -> None:
        """Returns at once; the offer is kept and resent after a reconnect until its round commits.

        `offer.payload` carries the payload's bytes whatever their size: the link sends large ones as a blob.
        """
        ...

    def commits(self, after: int) -> Iterator[Commit]:
        """Commits in order from round `after` + 1 on, verified (chain and signature), blocking for new ones.

        Ends when `close` is called. Raises SwarmUnreachable when reconnecting was given up, LedgerCorrupt
        when a commit does not fit the chain.
        """
        ...

    def snapshot(self) -> SnapshotRef | None:
        """Asks for the newest replica that a live node can give; None: nobody can."""
        ...

    def publish(self, blob: bytes) -> Digest:
        """This node now serves the blob to members of the swarm (the two newest are kept)."""
        ...

    def fetch(self, digest: Digest, holder: str | None = None) -> bytes:
        """The blob, verified; from `holder` (a peer id) or from the coordinator. Raises SwarmUnreachable."""
        ...

    def report(self, report: Report) -> None:
        """Fingerprint, held-out loss, snapshot."""
        ...

    def wanted_snapshot(self) -> bool:
        """True once after the coordinator has asked this node for its replica: publish and report one."""
        ...

    def events(self) -> Iterator[LinkEvent]:
        """Blocks for the next thing worth telling; ends when `close` is called."""
        ...

    def traffic(self) -> Traffic: ...

    def close(self) -> None:
        """Leaves the swarm, sends what is still pending for at most 5 s, wakes `commits` and `events`."""
        ...
