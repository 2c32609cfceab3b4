"""What a session with the coordinator asks its node, and tells it: a contract."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Protocol

from ...compression.errors import ThinwireError
from ...coordinator.protocol.messages import Commit, Digest, Heartbeat, Message, Welcome


class SessionHandler(Protocol):
    """All of it in the event loop."""

    def known_head(self) -> tuple[int | None, Digest | None]:
        """Round and digest of the last commit that the node has, for Hello; None: it has none."""
        ...

    def over_after(self) -> int | None:
        """The run's last round, if the node knows that it is committed; None: the run goes on."""
        ...

    def missing_commits(self, after: int, up_to: int) -> Iterator[Commit]:
        """Commits after the one round up to the other: for a coordinator that has lost them."""
        ...

    def keep_record_0(self, welcome: Welcome) -> None:
        """It was verified; the ledger that follows it may be read before a session begins."""
        ...

    def connected(self, welcome: Welcome) -> None:
        """A session begins; the first one, or one after a break."""
        ...

    def greeting(self) -> list[Message]:
        """What a new session has to hear: state, what is followed, what was not yet acknowledged."""
        ...

    async def received(self, message: Message) -> None:
        """Raises LedgerCorrupt or BadMessage."""
        ...

    def heartbeat(self) -> Heartbeat: ...

    def last_heard_s(self) -> float:
        """When other streams last brought bytes from the coordinator, in monotonic seconds; 0: never."""
        ...

    def tell(self, text: str, warning: bool) -> None:
        """Something for people to read."""
        ...

    def refused(self) -> None:
        """The coordinator has closed the session because of something that this node has sent."""
        ...

    def failed(self, error: ThinwireError) -> None:
        """The session is over for good."""
        ...

    async def serve_blobs(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A `StreamHandler` for the blobs that other nodes ask for."""
        ...

    async def serve_neighbours(
        self, peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """A `StreamHandler` for what neighbours in gossip send and ask for."""
        ...
