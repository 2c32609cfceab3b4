"""Blobs from the coordinator and from other members: payloads and snapshots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from ...compression.errors import SwarmUnreachable, ThinwireError
from ...coordinator.protocol.blob_streams import Base, NotServed
from ...coordinator.protocol.messages import Digest
from ...coordinator.protocol.streams import BLOB, Stream, TrafficKind
from .base import Lied
from .blob_client import BlobClient, Holders
from .coordinator_session import CoordinatorSession
from .known_seats import KnownSeats
from .members import MemberList

_DOWNLOADS = 4
_RETRY_S = 0.3
_MEMBERS_S = 0.5
"""After so long a member list that was on its way is here."""


class _Unlisted(SwarmUnreachable):
    """The peer is not on the member list."""


class BlobFetcher:
    """The `Sources` of a real network. One event loop; `members` is called from any thread.

    `own`: this node's peer id; `seats`: of the run's committee.
    """

    def __init__(
        self, coordinator: CoordinatorSession, members: MemberList, own: str, seats: KnownSeats
    ) -> None:
        self._coordinator, self._members, self._own, self._seats = coordinator, members, own, seats
        self._downloads = BlobClient(lambda: coordinator.open_stream(BLOB), _DOWNLOADS)
        self._holders = Holders(self._open_stream_to)
        self._error: ThinwireError | None = None

    @property
    def heard_s(self) -> float:
        """When bytes of a blob last came from the coordinator, in monotonic seconds; 0: never."""
        return self._downloads.heard_s

    def close(self) -> None:
        self._downloads.close()
        self._holders.close()

    def fail(self, error: ThinwireError) -> None:
        """The coordinator will not come back: from now on every fetch from it fails with this reason."""
        self._error = error

    def members_changed(self) -> None:
        """Streams to peers that are no members any more are closed."""
        self._holders.keep_only([*self._members.all(), *self._seats.in_order()])

    async def fetch(self, digest: Digest, n_bytes: int) -> bytes:
        """A blob from the coordinator, or another seat; waits for one's return. Raises SwarmUnreachable."""
        refused = 0
        while True:
            try:
                return await self._from_coordinator(digest, n_bytes, "snapshot")
            except (NotServed, Lied):
                refused += 1
                if refused > 1:  # once is what a session that has just been replaced may answer
                    found = await self._from_other_seats(digest, n_bytes)
                    if found is not None:
                        return found
                    raise
            except SwarmUnreachable:
                found = await self._from_other_seats(digest, n_bytes)
                if found is not None:
                    return found
                await self.reconnected(None)
            await asyncio.sleep(_RETRY_S)

    async def fetch_from(self, holder: str, digest: Digest, n_bytes: int, base: Base | None = None) -> bytes:
        """A blob that another node serves. Raises SwarmUnreachable."""
        try:
            return await self._holders.get(holder, digest, n_bytes, "snapshot", base)
        except (NotServed, _Unlisted):
            if self._holders.has_answered(holder):
                raise
        # The member list may be on its way still, to this node or to the other one.
        await asyncio.sleep(_MEMBERS_S)
        return await self._holders.get(holder, digest, n_bytes, "snapshot", base)

    async def from_coordinator(self, digest: Digest, n_bytes: int, referred: bool = False) -> bytes:
        """One attempt to get a payload. `referred`: see `get_blob`. Raises SwarmUnreachable."""
        return await self._from_coordinator(digest, n_bytes, "payload", referred)

    async def from_member(
        self, holder: str, digest: Digest, n_bytes: int, waits: Callable[[], object] = bool
    ) -> bytes:
        """One attempt to get a payload, also from the coordinator by its peer id. `waits`: see `get_blob`.
        Raises SwarmUnreachable."""
        if self.is_coordinator(holder):
            return await self.from_coordinator(digest, n_bytes)
        return await self._holders.get(holder, digest, n_bytes, "payload", waits=waits)

    async def _from_other_seats(self, digest: Digest, n_bytes: int) -> bytes | None:
        """None: none of them has it."""
        for seat in self._coordinator.other_seats():
            with contextlib.suppress(SwarmUnreachable):
                return await self._holders.get(seat, digest, n_bytes, "snapshot")
        return None

    def holders(self, offerer: str | None) -> list[str]:
        """Who may have a payload beside the coordinator: the others, then other seats."""
        others = self.members(offerer)
        return others + [seat for seat in self._coordinator.other_seats() if seat not in others]

    def members(self, first: str | None = None) -> list[str]:
        """The others that are connected: those that answer before those that do not, `first` before all."""
        others = [peer_id for peer_id in self._members.connected() if peer_id != self._own]
        return sorted(others, key=lambda peer_id: (self._holders.rests(peer_id), peer_id != first))

    def is_coordinator(self, holder: str) -> bool:
        """Whether the session is with it."""
        return holder == self._coordinator.seat

    def rests(self, holder: str) -> bool:
        """Whether fetches from it keep failing."""
        return self._holders.rests(holder)

    def heard_bytes(self, holder: str) -> int:
        """So many have come from it, whatever they are of."""
        return self._holders.heard_bytes(holder)

    def too_slow(self, holder: str) -> None:
        """It had something that came sooner from the coordinator."""
        self._holders.failed(holder)

    async def reconnected(self, timeout_s: float | None) -> None:
        """Returns when the coordinator is connected, or time is up. Raises SwarmUnreachable: given up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._coordinator.is_up.wait()
        if self._error is not None:
            raise SwarmUnreachable(str(self._error))

    async def _from_coordinator(
        self, digest: Digest, n_bytes: int, purpose: TrafficKind, referred: bool = False
    ) -> bytes:
        if self._error is not None:
            raise SwarmUnreachable(str(self._error))
        return await self._downloads.get(digest, n_bytes, purpose, referred=referred)

    async def _open_stream_to(self, holder: str) -> Stream:
        addresses = self._members.addresses(holder)
        if addresses is None and holder in self._seats:
            addresses = self._seats.addresses(holder)
        if addresses is None:
            raise _Unlisted(f"{holder} is not connected to the swarm")
        return await self._coordinator.open_stream_to(holder, addresses, BLOB)
