"""Who the other members of a swarm are, by the coordinator's list."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...coordinator.protocol.messages import MAX_PEERS, BadMessage, Members

_GRACE_S = 30.0
"""Who is off the list counts as a member between nodes for so long: a coordinator that was restarted lists
its peers as they come back."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """Where a member is reached, and until when it counts as one, in monotonic seconds."""

    addresses: tuple[str, ...]
    until_s: float


class MemberList:
    """Changed in the event loop, read from any thread. Empty until the coordinator has sent its list."""

    def __init__(self) -> None:
        self._listed: Mapping[str, _Listed] = {}
        """Replaced as a whole, never changed."""

    def update(self, members: Mapping[str, tuple[str, ...]]) -> None:
        """Takes over the coordinator's list, peer id -> addresses; who has left it stays for a while."""
        now_s = time.monotonic()
        left = {
            peer_id: replace(listed, until_s=min(listed.until_s, now_s + _GRACE_S))
            for peer_id, listed in self._listed.items()
            if listed.until_s > now_s
        }
        self._listed = left | {p: _Listed(addresses, math.inf) for p, addresses in members.items()}

    def heard(self, said: Members) -> None:
        """All of the list, or what is different. Raises BadMessage, and stays as it was, for more than there
        can be."""
        if not said.is_change:
            self.update(said.by_peer)
            return
        listed = {p: one.addresses for p, one in self._listed.items() if one.until_s == math.inf}
        listed = {p: where for p, where in listed.items() if p not in said.left} | said.by_peer
        if len(listed) > 2 * MAX_PEERS:  # who has left may be told after who has come
            raise BadMessage(f"{len(listed)} members, at most {MAX_PEERS} are in a swarm")
        self.update(listed)

    def connected(self) -> list[str]:
        """Peer ids of those that are on the list now."""
        return [peer_id for peer_id, listed in self._listed.items() if listed.until_s == math.inf]

    def all(self) -> list[str]:
        """Peer ids, those that have left the list a while ago among them."""
        return list(self._listed)

    def addresses(self, peer_id: str) -> tuple[str, ...] | None:
        """Where a member is reached; None: it is no member."""
        listed = self._listed.get(peer_id)
        return listed.addresses if listed is not None and time.monotonic() < listed.until_s else None

    def __contains__(self, peer_id: str) -> bool:
        return self.addresses(peer_id) is not None
