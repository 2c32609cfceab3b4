"""Whose seat it is: what `Council` asks of the coordinator around it, and tells it. A contract."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from ...protocol.messages import CommitteeEntry
from ..provisions import Shelf


class Owner(Shelf, Protocol):
    """Called in the event loop."""

    def is_ready(self) -> bool:
        """Whether it is known what the ledger needs: this seat could lead."""
        ...

    def leads(self) -> None:
        """This seat may propose: a service is to be built."""
        ...

    def steps_down(self, why: str) -> None:
        """It may not any more."""
        ...

    def recorded(self, round_: int) -> None:
        """A record is on the disk."""
        ...

    def renewed(self) -> None:
        """There is another committee, or who may come in has changed."""
        ...

    def held(self, digest: bytes) -> None:
        """Enough seats hold this payload now."""
        ...

    def name_committee(self, entry: CommitteeEntry) -> None:
        """Asked of who leads."""
        ...

    def memory(self) -> bytes:
        """Of who leads: what its successor wants to know."""
        ...

    def remember(self, packed: bytes) -> None:
        """That of another leader."""
        ...

    def verify(self, record: bytes, work: bytes) -> Awaitable[None] | None:
        """Checks the many signatures of a record that is proposed, off the event loop; None: they are few."""
        ...

    def kept_from(self) -> int:
        """Payloads of the rounds from there on are here."""
        ...

    def recovery(self) -> bytes:
        """Digest of the key that is to be the run's recovery key, where it has none yet; b"": it has."""
        ...
