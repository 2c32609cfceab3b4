"""The contract between gossip and a network: who is there, and bytes from and to neighbours, peer to peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class Exchange(Protocol):
    """One round's exchange, which goes on in the background since it was begun."""

    def received(self) -> list[tuple[str, bytes]]:
        """What neighbours have sent, in the order in which they were named. Waits for those that may still
        send something, for a bounded time; who is gone or late is left out. Nothing once the node leaves."""
        ...


class Neighbours(Protocol):
    """Of one peer. Names of peers mean nothing here but that they are the same for all. Bytes are bounded and
    come from whom they say; what they hold was not looked at."""

    @property
    def me(self) -> str:
        """This peer's name."""
        ...

    def peers(self, round_: int) -> Mapping[str, int]:
        """Whose offers the commit of that round counted, by name, each with the number that it came in with;
        the same for all that know it. Nobody, where it is not known, or long ago."""
        ...

    def exchange(self, round_: int, with_: Sequence[str], data: bytes) -> Exchange:
        """Sends to these peers, who send to this one. Returns at once; an earlier exchange is over."""
        ...

    def secret(self, peer: str) -> bytes:
        """Of this peer and that one, the same for both, known to nobody else and in every round."""
        ...

    def borrow(self) -> list[tuple[int, bytes]]:
        """What some peers have last sent to their neighbours, with its round; for one that has just come."""
        ...
