"""The contract of exchanges between nodes: a round's message from each of some peers to the others, neither
by way of the coordinator nor in the ledger. What a message holds is the strategy's affair."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class EdgeBytes:
    """Of messages between this node and one peer so far, and of them those that a member has carried."""

    sent: int = 0
    received: int = 0
    relayed: int = 0


class NeighbourLink(Protocol):
    """A part of a link; from any thread, between its `open` and its `close`."""

    def send(self, round_: int, to: Sequence[str], data: bytes) -> None:
        """Begins to send it to these members, who send one to this node. Returns at once; what is under way
        to a member comes to its end before, and of messages that wait the newest is sent."""
        ...

    def received(self, round_: int, awaited: Collection[str], timeout_s: float) -> list[tuple[str, bytes]]:
        """What those have sent for the round that `send` has named, in their order. Waits for the `awaited`
        that are there, for so long at most; empty once the link is closed."""
        ...

    def latest(self, timeout_s: float) -> list[tuple[int, bytes]]:
        """What a few members have last sent, with its round."""
        ...

    def secret(self, peer: str) -> bytes:
        """See `Neighbours`."""
        ...

    def edges(self) -> Mapping[str, EdgeBytes]:
        """By peer."""
        ...

    def carried(self) -> int:
        """Bytes of messages between others that this node has carried so far."""
        ...

    def rejected(self) -> Mapping[str, int]:
        """Messages that were refused before anybody looked into them, by the reason."""
        ...
